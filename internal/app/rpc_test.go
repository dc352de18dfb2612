package app

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/clients"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rabbitrpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// With RPCOverRabbitMQ the API also serves its RPCs from queues, through the same interceptors as over HTTP, and HTTP
// does not depend on the broker.
func TestAPIServesOverRabbitMQ(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		edge Edge
		want *connect.Error
	}{
		"Open":   {Edge{NoAuth: true}, connect.NewError(connect.CodeInternal, "internal error")},
		"Closed": {Edge{}, connect.NewError(connect.CodeUnauthenticated, "")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testQueueAPI(t, test.edge, test.want)
		})
	}
}

// queueAPI returns the config of an API over RabbitMQ with one method, which counts its calls and fails.
func queueAPI(t *testing.T, edge Edge) (config Config, spec connect.Spec, executed *atomic.Int64) {
	spec, executed = connect.Spec{Procedure: "/probe.v1.Probe/Unary"}, new(atomic.Int64)
	config = Config{
		PostgresURL: testenv.As(t, testenv.PostgresURL(t), "shop_api"), Edge: edge,
		Features: Features{RPCOverRabbitMQ: RPCOverRabbitMQ{Serve: true, Prefetch: 5}},
	}
	config.domain = func(deps) (domain, error) {
		return domain{register: func(s *connect.Server) {
			handler := func(context.Context, connect.Spec, connect.ServerStream) error {
				executed.Add(1)
				return errors.New("secret")
			}
			s.Register(connect.Method{Spec: spec, Handler: handler})
		}}, nil
	}
	return config, spec, executed
}

func testQueueAPI(t *testing.T, edge Edge, want *connect.Error) {
	config, spec, executed := queueAPI(t, edge)
	amqpURL := testenv.AMQP(t)
	broker, proxied := testenv.ProxyURL(t, amqpURL)
	config.AMQPURL = proxied
	broker.Refuse(true)
	ready := serve(t, RunAPI, config)
	await(t, "without the broker", ready, http.StatusOK)
	broker.Refuse(false)

	awaitError(t, amqpURL, spec, want)
	if want.Code() == connect.CodeUnauthenticated && executed.Load() > 0 {
		t.Error("a call without credentials was executed")
	}
}

// awaitError calls over RabbitMQ until the call returns the error.
func awaitError(t *testing.T, amqpURL string, spec connect.Spec, want *connect.Error) {
	t.Helper()
	transport := rabbitrpc.NewTransport(rabbitrpc.TransportConfig{URL: amqpURL})
	defer transport.Close()
	testenv.Eventually(t, 20*time.Second, func() error {
		client := connect.NewClient(transport)
		err := client.CallUnary(t.Context(), spec, wrapperspb.String(""), new(wrapperspb.StringValue))
		var answer *connect.Error
		if !errors.As(err, &answer) || answer.Code() != want.Code() ||
			want.Message() != "" && answer.Message() != want.Message() {
			return fmt.Errorf("got %w, want %w", err, want)
		}
		return nil
	})
}

// An API over RabbitMQ and its callers need exactly their permissions on the broker.
func TestLeastPrivilegeOverRabbitMQ(t *testing.T) {
	t.Parallel()
	config, spec, _ := queueAPI(t, Edge{NoAuth: true})
	admin, permissions := testenv.AMQP(t), names(t, config).permissions()
	user := func(name string) string {
		p := permissions[name]
		return testenv.Management(t, admin).User(p.Configure, p.Write, p.Read)
	}
	config.AMQPURL = user("rpc-server")
	await(t, "api", serve(t, RunAPI, config), http.StatusOK)
	awaitError(t, user("rpc-client"), spec, connect.NewError(connect.CodeInternal, "internal error"))
}

// A domain calls a service over RabbitMQ with the permissions of rpc-client, and its client ends with the process.
func TestTheDomainCallsOverRabbitMQ(t *testing.T) {
	t.Parallel()
	served, spec, executed := queueAPI(t, Edge{NoAuth: true})
	served.AMQPURL = testenv.AMQP(t)
	await(t, "api", serve(t, RunAPI, served), http.StatusOK)
	permissions := names(t, served).permissions()["rpc-client"]
	url := testenv.Management(t, served.AMQPURL).User(permissions.Configure, permissions.Write, permissions.Read)

	var made *connect.Client
	config := Config{PostgresURL: testenv.PostgresURL(t), Edge: Edge{NoAuth: true}, Domain: new(DomainConfig)}
	config.domain = func(d deps) (_ domain, err error) {
		if d.namesOnly {
			url = ""
		}
		made, err = d.clientOverRabbitMQ(url, clients.Config{Timeout: 20 * time.Second})
		return domain{register: func(*connect.Server) {}}, err
	}
	calling := start(t, RunAPI, config)
	await(t, "calling", calling.ready, http.StatusOK)
	call := func() error {
		return made.CallUnary(t.Context(), spec, wrapperspb.String(""), new(wrapperspb.StringValue))
	}
	// Until the API has its queue, calls are unavailable.
	testenv.Eventually(t, 30*time.Second, func() error {
		if err := call(); connect.CodeOf(err) != connect.CodeInternal {
			return err
		}
		return nil
	})
	if executed.Load() != 1 {
		t.Errorf("executed %d times", executed.Load())
	}
	calling.stop()
	if err := call(); connect.CodeOf(err) != connect.CodeUnavailable || executed.Load() != 1 {
		t.Errorf("after the end of the process: %v, executed %d times", err, executed.Load())
	}
	names(t, config)
}
