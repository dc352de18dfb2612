package clients

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strings"
	"testing"

	"example.com/orders/internal/app"
	"github.com/google/uuid"
)

// A page in a real browser, on another origin that is allowed, places an order durably and watches what becomes of it.
func TestAPageOfAnotherOriginPlacesAnOrderDurably(t *testing.T) {
	t.Parallel()
	const prepare = `bash scripts/packages.sh web && { command -v chromium || command -v google-chrome || bash scripts/need.sh chromium chromium; } && { command -v chromium || command -v google-chrome; }`
	found := exec.Command("bash", "-c", prepare)
	found.Dir = root
	output, err := found.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	lines := strings.Fields(string(output))
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = w.Write([]byte("<!doctype html><title>shop</title>"))
	}))
	defer page.Close()
	origin := strings.Replace(page.URL, "127.0.0.1", "localhost", 1) // another site, too
	addr := serve(t, func(config *app.Config) { config.Edge.Origins = []string{origin} })
	place(t, newClient(t, addr), "apple") // so that the consumers are at work
	order, err := json.Marshal(map[string]any{"orderId": uuid.NewString(), "customerId": "ann", "lines": []any{map[string]any{"sku": "apple", "quantity": 1}}})
	if err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(map[string]string{"page": origin, "api": "http://" + addr, "order": string(order), "chromium": lines[len(lines)-1]})
	if err != nil {
		t.Fatal(err)
	}
	command := exec.CommandContext(t.Context(), "node", "test/origin.mjs", string(config))
	command.Dir, command.Stderr = root+"/web", t.Output()
	printed, err := command.Output()
	var seen struct {
		Status                                 int
		Operation, Applied, RequestID, Watched string
		Same                                   bool
	}
	if err == nil {
		err = json.Unmarshal(printed, &seen)
	}
	if err != nil || seen.Status != http.StatusOK || !strings.HasPrefix(seen.Operation, "operations/") || seen.Applied != "respond-async" ||
		seen.RequestID != "page-1" || !seen.Same || !strings.Contains(seen.Watched, "OPERATION_STATE_SUCCEEDED") {
		t.Errorf("got %+v, %v", seen, err)
	}
}
