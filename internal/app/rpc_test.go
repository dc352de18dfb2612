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
	"example.com/shop/internal/changes"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/rabbitrpc"
	"github.com/jackc/pgx/v5/pgxpool"
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

func testQueueAPI(t *testing.T, edge Edge, want *connect.Error) {
	spec := connect.Spec{Procedure: "/probe.v1.Probe/Unary"}
	config := Config{
		PostgresURL:     testenv.As(t, testenv.PostgresURL(t), "shop_api"),
		RPCOverRabbitMQ: true, RPCPrefetch: 5, Edge: edge,
	}
	var executed atomic.Int64
	config.domain = func(*pgxpool.Pool, *outbox.Writer, *changes.Hub) domain {
		return domain{register: func(s *connect.Server) {
			handler := func(context.Context, connect.Spec, connect.ServerStream) error {
				executed.Add(1)
				return errors.New("secret")
			}
			s.Register(connect.Method{Spec: spec, Handler: handler})
		}}
	}
	amqpURL := testenv.AMQP(t)
	broker, proxied := testenv.ProxyURL(t, amqpURL)
	config.AMQPURL = proxied
	broker.Refuse(true)
	ready := serve(t, RunAPI, config)
	await(t, "without the broker", ready, http.StatusOK)
	broker.Refuse(false)

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
	if want.Code() == connect.CodeUnauthenticated && executed.Load() > 0 {
		t.Error("a call without credentials was executed")
	}
}
