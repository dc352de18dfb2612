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
	"github.com/jackc/pgx/v5"
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

// forwardedCalls serve the methods of other services; see deps.forward.
type forwardedCalls []func(*connect.Server) error

// processCalls serves and executes the durable calls of one process.
type processCalls struct {
	*process
	*operations.Operations
}

func durableCalls(p *process) feature {
	identity := operations.Identity{Name: callerName, Capture: p.captureCaller, Restore: restoreCaller}
	calls := &processCalls{p, operations.New(p.db, p.out, p.changes, operations.Config{
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

// submitAs returns a function that submits a durable call of the service's own API as part of tx, in an RPC or in a
// message handler. The caller of the call is the service itself, with the given roles. Without CALL_KEYS the function
// returns failed_precondition.
func (d deps) submitAs(roles ...string) func(context.Context, pgx.Tx, operations.Call) (name string, err error) {
	caller := auth.Caller{Subject: ServiceName, Roles: roles, By: "service"}
	return func(ctx context.Context, tx pgx.Tx, call operations.Call) (string, error) {
		return d.process.shared.durableCalls.Submit(auth.As(ctx, caller), tx, call)
	}
}

// forward makes submitAs also take calls of another service, by its full name, such as invoices.v1.InvoiceService. The
// consumer makes these calls through client, again and again while the other service is unavailable. The roles of
// submitAs must be those that the other service's proto file asks for; the other service itself checks the credentials
// of client.
func (d deps) forward(client *connect.Client, service string) error {
	d.process.shared.forwarded = append(d.process.shared.forwarded, func(server *connect.Server) error {
		return operations.Forward(server, client, service)
	})
	return operations.Forward(connect.NewServer(), client, service) // a typo ends every process, not just consumers
}

// startWorker executes durable calls with an internal server of the same services, which listens on no port.
func (c *processCalls) startWorker(context.Context) {
	meters, tracers := c.telemetry.Meter, c.telemetry.Tracer
	interceptors := []connect.ServerInterceptor{rpcserver.Telemetry(meters, tracers)}
	interceptors = append(interceptors, rpcserver.Interceptors(slog.Default(), auth.Authorize(slog.Default()))...)
	server := connect.NewServer(interceptors...)
	c.register(server)
	for _, add := range c.shared.forwarded {
		if err := add(server); err != nil { // cannot happen: forward has tried the same
			c.group.Go(func() error { return err })
			return
		}
	}
	config := operations.WorkerConfig{
		Concurrency: cmp.Or(c.config.DurableCalls.Concurrency, max(1, int(c.db.Config().MaxConns)/2-1)),
		Limits:      c.config.DurableCalls.Limits, Inbox: inboxConfig,
	}
	config.Inbox.AfterCommit, config.Inbox.MeterProvider, config.Inbox.TracerProvider = c.bell.Ring, meters, tracers
	worker := operations.NewWorker(c.db, c.Operations, server, config)
	c.consume(callsGroup, worker, rabbit.ConsumerConfig{Unordered: true, Prefetch: config.Prefetch()})
}
