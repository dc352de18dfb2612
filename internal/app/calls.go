package app

import (
	"cmp"
	"context"
	"encoding/json"
	"log/slog"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/idempotency"
	"example.com/shop/internal/operations"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/rabbit"
	"example.com/shop/internal/rpcserver"
)

// Calls sets up durable calls.
type Calls struct {
	// Keys sign who the caller of a durable call is; see operations.Config. Without keys the API refuses durable calls, unless authentication is off.
	Keys [][]byte
	// Concurrency and Limits say how many calls a consumer process executes at once, in all and of single methods; see operations.WorkerConfig. Each
	// takes a connection and, now and then, another, so Concurrency must be at most half of MaxConns. Default one less than half.
	Concurrency int
	Limits      map[string]int
}

// callsQueue takes durable calls. They have no order, so every consumer process works on it.
var callsQueue = rabbit.Queue{Name: ServiceName + "." + operations.Consumer, Types: []string{operations.MessageType}, Unordered: true}

// newCalls makes what takes durable calls and remembers keys, for the process that serves or executes.
func (p *process) newCalls(out *outbox.Writer) {
	identity := operations.Identity{Name: callerName, Capture: p.captureCaller, Restore: restoreCaller}
	p.calls = operations.New(p.db, out, p.changes, operations.Config{Identity: identity, Keys: p.config.Calls.Keys})
	p.keys = idempotency.New(p.db, out, idempotency.Config{Caller: identity.Caller})
}

// callerName tells callers apart; "" is whoever has no credentials.
func callerName(ctx context.Context) string {
	caller, known := auth.FromContext(ctx)
	if !known {
		return ""
	}
	return caller.By + ":" + caller.Subject
}

// captureCaller keeps who calls, and what it may do at this time. Unsigned, that would be worth nothing, unless authentication is off anyway.
func (p *process) captureCaller(ctx context.Context) ([]byte, error) {
	caller, _ := auth.FromContext(ctx)
	if len(p.config.Calls.Keys) == 0 && caller.By != "nothing" {
		return nil, connect.NewError(connect.CodeFailedPrecondition, "durable calls are not set up: the service has no key to sign callers with (CALL_KEYS)")
	}
	return json.Marshal(caller)
}

func restoreCaller(ctx context.Context, captured []byte) (context.Context, error) {
	var caller auth.Caller
	err := json.Unmarshal(captured, &caller)
	return auth.As(ctx, caller), err
}

// startCalls executes durable calls, by a server of the same services that nobody can reach otherwise.
func (p *process) startCalls() {
	meters, tracers := p.telemetry.Meter, p.telemetry.Tracer
	server := connect.NewServer(append([]connect.ServerInterceptor{rpcserver.Telemetry(meters, tracers)}, rpcserver.Interceptors(slog.Default(), auth.Authorize(slog.Default()))...)...)
	p.domain.register(server)
	p.calls.Register(server)
	config := operations.WorkerConfig{
		Concurrency: cmp.Or(p.config.Calls.Concurrency, max(1, int(p.db.Config().MaxConns)/2-1)), Limits: p.config.Calls.Limits, Inbox: inboxConfig,
	}
	config.Inbox.AfterCommit, config.Inbox.MeterProvider, config.Inbox.TracerProvider = p.bell.Ring, meters, tracers
	worker := operations.NewWorker(p.db, p.calls, server, config)
	consumer := rabbit.NewConsumer(rabbit.ConsumerConfig{
		URL: p.config.AMQPURL, Topology: p.topology(), Queue: callsQueue.Name, Name: p.connectionName("consumer " + operations.Consumer),
		Unordered: true, Prefetch: config.Prefetch(), MaxBytes: p.deliveryBytes(), MeterProvider: meters,
	}, worker.Process)
	drain := rabbit.NewConsumer(rabbit.ConsumerConfig{
		URL: p.config.AMQPURL, Topology: p.topology(), Queue: rabbit.DeadQueue(callsQueue.Name), Name: p.connectionName("drain " + operations.Consumer),
		MaxBytes: p.deliveryBytes(), MeterProvider: meters,
	}, worker.Drain)
	p.group.Go(func() error {
		return p.remembered(func(ctx context.Context) error { return worker.WhileResumed(ctx, consumer.Run) })
	})
	p.group.Go(func() error { return p.remembered(drain.Run) })
	p.group.Go(func() error { return p.remembered(worker.Run) })
}
