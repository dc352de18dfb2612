package clients

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os/exec"
	"strings"
	"testing"

	"example.com/shop/internal/app"
	"github.com/google/uuid"
)

// A page in a real browser, from another origin that is allowed, places an order durably and watches the operation.
func TestAPageOfAnotherOriginPlacesAnOrderDurably(t *testing.T) {
	t.Parallel()
	const prepare = `bash scripts/packages.sh web &&
		{ command -v chromium || command -v google-chrome || bash scripts/need.sh chromium chromium; } &&
		{ command -v chromium || command -v google-chrome; }`
	found := exec.Command("bash", "-c", prepare)
	found.Dir = root
	output, err := found.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	lines := strings.Fields(string(output))
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = w.Write([]byte("<!doctype html><title>page</title>"))
	}))
	defer page.Close()
	origin := strings.Replace(page.URL, "127.0.0.1", "localhost", 1) // also another site
	addr := serve(t, func(config *app.Config) { config.Edge.Origins = []string{origin} })
	place(t, newClient(t, addr), "apple") // so that the consumers are running
	order, err := json.Marshal(map[string]any{
		"orderId": uuid.NewString(), "customerId": "ann", "lines": []any{map[string]any{"sku": "apple", "quantity": 1}},
	})
	if err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(map[string]string{
		"page": origin, "api": "http://" + addr, "order": string(order), "chromium": lines[len(lines)-1],
	})
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
	if err != nil || seen.Status != http.StatusOK || !strings.HasPrefix(seen.Operation, "operations/") ||
		seen.Applied != "respond-async" || seen.RequestID != "page-1" || !seen.Same ||
		!strings.Contains(seen.Watched, "OPERATION_STATE_SUCCEEDED") {
		t.Errorf("got %+v, %v", seen, err)
	}
}

// A filter with an unknown status is refused; it does not return all orders. An unknown field is ignored.
func TestAFilterWithAnUnknownStatusIsRefused(t *testing.T) {
	t.Parallel()
	method := "http://" + serve(t) + "/orders.v1.OrderService/ListOrders"
	for filter, want := range map[string]int{
		`{"status":"ORDER_STATUS_CANCELED"}`:             http.StatusBadRequest,
		`{"status":"ORDER_STATUS_CANCELLED","more":"x"}`: http.StatusOK,
	} {
		posted, err := http.Post(method, "application/json", strings.NewReader(filter))
		if err != nil {
			t.Fatal(err)
		}
		posted.Body.Close()
		got, err := http.Get(method + "?connect=v1&encoding=json&message=" + url.QueryEscape(filter))
		if err != nil {
			t.Fatal(err)
		}
		got.Body.Close()
		if posted.StatusCode != want || got.StatusCode != want {
			t.Errorf("%s: POST %s, GET %s, want %d", filter, posted.Status, got.Status, want)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}
