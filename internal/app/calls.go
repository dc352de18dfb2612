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
	// Keys sign the caller of a durable call; see operations.Config. Without keys the API refuses durable calls, unless
	// authentication is off.
	Keys [][]byte
	// Concurrency and Limits bound how many calls a consumer process executes at once, in total and per method; see
	// operations.WorkerConfig. Each call uses a connection and, at times, a second one, so Concurrency must be at most
	// half of MaxConns. The default is one less than half.
	Concurrency int
	Limits      map[string]int
}

// callsQueue is the queue of durable calls. They have no order, so every consumer process consumes from it.
var callsQueue = rabbit.Queue{
	Name: ServiceName + "." + operations.Consumer, Types: []string{operations.MessageType}, Unordered: true,
}

// newCalls sets up durable calls and idempotency keys, for processes that serve or execute calls.
func (p *process) newCalls(out *outbox.Writer) {
	identity := operations.Identity{Name: callerName, Capture: p.captureCaller, Restore: restoreCaller}
	p.calls = operations.New(p.db, out, p.changes, operations.Config{Identity: identity, Keys: p.config.Calls.Keys})
	p.keys = idempotency.New(p.db, out, idempotency.Config{Caller: identity.Caller})
}

// callerName returns a unique name of the caller, "" without credentials.
func callerName(ctx context.Context) string {
	caller, known := auth.FromContext(ctx)
	if !known {
		return ""
	}
	return caller.By + ":" + caller.Subject
}

// captureCaller encodes the caller and its roles. It refuses if there is no key to sign them with, unless
// authentication is off: anybody could forge them.
func (p *process) captureCaller(ctx context.Context) ([]byte, error) {
	caller, _ := auth.FromContext(ctx)
	if len(p.config.Calls.Keys) == 0 && caller.By != "nothing" {
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

// startCalls executes durable calls with an internal server of the same services, which listens on no port.
func (p *process) startCalls() {
	meters, tracers := p.telemetry.Meter, p.telemetry.Tracer
	interceptors := []connect.ServerInterceptor{rpcserver.Telemetry(meters, tracers)}
	interceptors = append(interceptors, rpcserver.Interceptors(slog.Default(), auth.Authorize(slog.Default()))...)
	server := connect.NewServer(interceptors...)
	p.domain.register(server)
	p.calls.Register(server)
	config := operations.WorkerConfig{
		Concurrency: cmp.Or(p.config.Calls.Concurrency, max(1, int(p.db.Config().MaxConns)/2-1)),
		Limits:      p.config.Calls.Limits, Inbox: inboxConfig,
	}
	config.Inbox.AfterCommit, config.Inbox.MeterProvider, config.Inbox.TracerProvider = p.bell.Ring, meters, tracers
	worker := operations.NewWorker(p.db, p.calls, server, config)
	consumer := rabbit.NewConsumer(rabbit.ConsumerConfig{
		URL: p.config.AMQPURL, Topology: p.topology(), Queue: callsQueue.Name,
		Name:      p.connectionName("consumer " + operations.Consumer),
		Unordered: true, Prefetch: config.Prefetch(), MaxBytes: p.deliveryBytes(), MeterProvider: meters,
	}, worker.Process)
	drain := rabbit.NewConsumer(rabbit.ConsumerConfig{
		URL: p.config.AMQPURL, Topology: p.topology(), Queue: rabbit.DeadQueue(callsQueue.Name),
		Name:     p.connectionName("drain " + operations.Consumer),
		MaxBytes: p.deliveryBytes(), MeterProvider: meters,
	}, worker.Drain)
	p.group.Go(func() error {
		return p.afterCheck(func(ctx context.Context) error { return worker.WhileResumed(ctx, consumer.Run) })
	})
	p.group.Go(func() error { return p.afterCheck(drain.Run) })
	p.group.Go(func() error { return p.afterCheck(worker.Run) })
}
