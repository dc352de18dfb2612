// Package clients calls the running service as its clients do. It tests that every kind of client gets the same
// responses, and that the examples in docs/client-examples.md work.
package clients

import (
	"context"
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/app"
	"example.com/shop/internal/dev/testenv"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"example.com/shop/internal/gen/orders/v1/ordersv1connect"
	"example.com/shop/internal/rabbitrpc"
	"github.com/google/uuid"
)

func TestMain(m *testing.M) {
	if !attacking() {
		testenv.Main(m)
	}
}

// token is the credential that clients send, each with its own means of setting headers. The service does not check it.
const token = "none"

// headers are the headers of every call of every client.
var headers = map[string]string{"Authorization": "Bearer " + token}

// serveQueues is like serve, and also serves over RabbitMQ.
func serveQueues(t *testing.T) (addr, amqpURL string) {
	t.Helper()
	amqpURL = testenv.AMQP(t)
	addr = serve(t, func(config *app.Config) { config.AMQPURL, config.RPCOverRabbitMQ.Serve = amqpURL, true })
	// Being ready does not imply that the API serves its queues.
	testenv.Eventually(t, 30*time.Second, func() error {
		names, err := app.Services()
		if err != nil {
			return err
		}
		states, err := rabbitrpc.Look(t.Context(), amqpURL, names...)
		for _, service := range states {
			if service.Replicas == 0 {
				return fmt.Errorf("no process serves %s", service.Name)
			}
		}
		return err
	})
	return addr, amqpURL
}

// serve runs the whole service on real servers until the test ends, and returns its address as host:port.
func serve(t *testing.T, changes ...func(*app.Config)) string {
	t.Helper()
	addr, opsAddr := testenv.FreeAddress(t), testenv.FreeAddress(t)
	config := app.Config{
		Addr: addr, OpsAddr: opsAddr, PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t), Exchange: "events",
		Edge: app.Edge{NoAuth: true},
	}
	for _, change := range changes {
		change(&config)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() {
		if err := app.RunAll(ctx, config); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); running.Wait() })
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	testenv.Eventually(t, 30*time.Second, func() error {
		response, err := client.Get("http://" + opsAddr + "/readyz")
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("not ready: %s", response.Status)
		}
		return nil
	})
	return addr
}

// root is the top of the repository.
var root, _ = filepath.Abs("../../..")

const installScript = `scripts/need.sh curl curl && scripts/packages.sh tools web && web/node_modules/.bin/tsc -p web`

// install makes curl, buf and the TypeScript client ready to run, once.
var install = sync.OnceValue(func() error {
	command := exec.Command("bash", "-c", installScript)
	command.Dir = root
	if output, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", installScript, err, output)
	}
	return nil
})

// newClient returns the client that tests use for their setup.
func newClient(t *testing.T, addr string) ordersv1connect.OrderServiceClient {
	t.Helper()
	return ordersv1connect.NewOrderServiceClient(connectClient(t, addr))
}

func connectClient(t *testing.T, addr string, options ...connecthttp.Option) *connect.Client {
	t.Helper()
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(transport.CloseIdleConnections)
	httpClient := &http.Client{Transport: withHeaders{transport}}
	return connect.NewClient(connecthttp.NewTransport(httpClient, "http://"+addr, options...))
}

// withHeaders adds the headers to every request.
type withHeaders struct{ http.RoundTripper }

func (w withHeaders) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	for name, value := range headers {
		r.Header.Set(name, value)
	}
	return w.RoundTripper.RoundTrip(r)
}

// place places an order and returns its ID.
func place(t *testing.T, client ordersv1connect.OrderServiceClient, sku string) string {
	t.Helper()
	id := uuid.NewString()
	_, err := client.PlaceOrder(t.Context(), &ordersv1.PlaceOrderRequest{
		OrderId: id, CustomerId: "ann", Lines: []*ordersv1.Line{{Sku: sku, Quantity: 1}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return id
}
