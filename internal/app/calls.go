package app

import (
	"cmp"
	"context"
	"encoding/json"
	"log/slog"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/operations"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/rabbit"
	"example.com/shop/internal/rpcserver"
)

// DurableCalls configures durable calls.
type DurableCalls struct {
	// Keys sign the caller of a durable call; see operations.Config. Without keys the API refuses durable calls, unless
	// authentication is off.
	Keys [][]byte
	// Concurrency and Limits bound how many calls a consumer process executes at once, in total and per method; see
	// operations.WorkerConfig. Each call uses a connection and, at times, a second one, so Concurrency must be at most
	// half of MaxConns. The default is one less than half.
	Concurrency int
	Limits      map[string]int
}

// callsGroup executes durable calls. They have no order, so every consumer process consumes from its queue.
var callsGroup = queueGroup{
	ops.Group{Name: operations.Consumer, Types: callTypes, Ended: operations.Ended},
	rabbit.Queue{Name: ServiceName + "." + operations.Consumer, Types: callTypes, Unordered: true},
}

var callTypes = []string{operations.MessageType}

// operationsOf is the durable calls of one process.
type operationsOf struct {
	*process
	*operations.Operations
}

func durableCalls(p *process) feature {
	identity := operations.Identity{Name: callerName, Capture: p.captureCaller, Restore: restoreCaller}
	calls := &operationsOf{p, operations.New(p.db, p.out, p.changes, operations.Config{
		Identity: identity, Keys: p.config.DurableCalls.Keys,
	})}
	p.shared.durableCalls = calls
	return feature{
		register: calls.Register, interceptor: calls.Interceptor(), headers: operations.Headers,
		group: &callsGroup, startConsumer: calls.startWorker,
	}
}

// captureCaller encodes the caller and its roles. It refuses if there is no key to sign them with, unless
// authentication is off: anybody could forge them.
func (p *process) captureCaller(ctx context.Context) ([]byte, error) {
	caller, _ := auth.FromContext(ctx)
	if len(p.config.DurableCalls.Keys) == 0 && caller.By != "nothing" {
		return nil, connect.NewError(connect.CodeFailedPrecondition,
			"durable calls are not configured: the service has no key to sign callers with (CALL_KEYS)")
	}
	return json.Marshal(caller)
}

func restoreCaller(ctx context.Context, captured []byte) (context.Context, error) {
	var caller auth.Caller
	err := json.Unmarshal(captured, &caller)
	return auth.As(ctx, caller), err
}

// startWorker executes durable calls with an internal server of the same services, which listens on no port.
func (c *operationsOf) startWorker(context.Context) {
	meters, tracers := c.telemetry.Meter, c.telemetry.Tracer
	interceptors := []connect.ServerInterceptor{rpcserver.Telemetry(meters, tracers)}
	interceptors = append(interceptors, rpcserver.Interceptors(slog.Default(), auth.Authorize(slog.Default()))...)
	server := connect.NewServer(interceptors...)
	c.register(server)
	config := operations.WorkerConfig{
		Concurrency: cmp.Or(c.config.DurableCalls.Concurrency, max(1, int(c.db.Config().MaxConns)/2-1)),
		Limits:      c.config.DurableCalls.Limits, Inbox: inboxConfig,
	}
	config.Inbox.AfterCommit, config.Inbox.MeterProvider, config.Inbox.TracerProvider = c.bell.Ring, meters, tracers
	worker := operations.NewWorker(c.db, c.Operations, server, config)
	c.consume(callsGroup, worker, rabbit.ConsumerConfig{Unordered: true, Prefetch: config.Prefetch()})
}
