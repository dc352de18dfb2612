package rpcserver_test

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"

	"example.com/shop/internal/rpcserver"
)

// A stream with an unknown compression gets an error that clients can read. Connect's own answer has an empty
// compression.
func TestUnknownCompressionOfAStream(t *testing.T) {
	t.Parallel()
	server := serve(t, rpcserver.Config{}, stream(func(context.Context, string,
		func(string) error) error {
		return nil
	}))
	message := strings.NewReader("\x00\x00\x00\x00\x02\"\"")
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.url+streamSpec.Procedure, message)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/connect+json")
	req.Header.Set("Connect-Content-Encoding", "br")
	res, err := httpClient(t, false).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	encoding, found := res.Header["Connect-Content-Encoding"]
	if found || err != nil || !strings.Contains(string(body), `"code":"unimplemented"`) {
		t.Errorf("got compression %q, %s, body %q, error %v", encoding, res.Status, body, err)
	}
}
