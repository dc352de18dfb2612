// Package app wires the processes: which parts each one runs, and with what. It is the only place where the database's side (outbox,
// inbox) and the broker's side (rabbit) meet.
package app

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/changes"
	"example.com/shop/internal/idempotency"
	"example.com/shop/internal/operations"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
	"example.com/shop/internal/rpcserver"
	"example.com/shop/internal/session"
	"example.com/shop/internal/telemetry"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"golang.org/x/sync/errgroup"
)

// Config is what the processes need to know. Flags and environment are read in cmd/shop.
type Config struct {
	PostgresURL string
	// ListenURL is a direct connection to the same database, for LISTEN: a transaction-mode pooler has none. Default PostgresURL, unless that
	// goes to such a pooler, as postgres.Config says; then the relay polls.
	ListenURL string
	AMQPURL   string
	// ManagementURL is RabbitMQ's management API, for the doctor and the console; "" if nothing is to be asked of it.
	ManagementURL string
	// Exchange is the topic exchange that events go to.
	Exchange string
	// TopologyGiven says that exchange and queues are declared by somebody else, and the processes need no permission to do so.
	TopologyGiven bool
	// Addr is where the API listens. Relay and consumer do not look at it.
	Addr string
	// OpsAddr is where the process answers probes and scrapes: /healthz, /readyz, /metrics. Default a free port of the loopback interface.
	OpsAddr string
	// ConsoleAddr is where RunAll serves the operators' console; "" for nowhere.
	ConsoleAddr string
	// MaxConns bounds the connections to Postgres of one process.
	MaxConns int32
	Relay    outbox.Config
	// HighWater is the backlog above which the API refuses to write.
	HighWater outbox.GateConfig
	// Prefetch and Batch set up the consumers; see rabbit.ConsumerConfig.
	Prefetch int
	Batch    int
	// RPCOverRabbitMQ has the API serve its RPCs from queues, too. It must know the AMQPURL then, and is ready without the broker as before.
	RPCOverRabbitMQ bool
	// RPCPrefetch is the most calls of one service that it executes at once for them.
	RPCPrefetch int
	Calls       Calls
	// Version is what telemetry calls the program's version.
	Version string
	// Spans takes the spans in place of the collector that the environment names: for tests.
	Spans sdktrace.SpanExporter
	// Edge is who may call the API.
	Edge Edge

	// domain makes what the service is about. Default defaultDomain; the core's tests bring their own, for the example will be deleted.
	domain func(db *pgxpool.Pool, out *outbox.Writer, hub *changes.Hub) domain
}

// WithServices returns the config with other services in place of the domain, and no consumer groups: for what tests the processes themselves.
func (c Config) WithServices(register func(*connect.Server)) Config {
	c.domain = func(*pgxpool.Pool, *outbox.Writer, *changes.Hub) domain { return domain{register: register} }
	return c
}

// defaultDomain makes what the program is about: newDomain, or what probes.go has in its place.
var defaultDomain = newDomain

// RunAPI serves the RPCs until ctx is done.
func RunAPI(ctx context.Context, config Config) error {
	return run(ctx, config, "api", (*process).startAPI)
}

// RunRelay publishes the outbox until ctx is done.
func RunRelay(ctx context.Context, config Config) error {
	return run(ctx, config, "relay", (*process).startRelay)
}

// RunConsumer runs every consumer group until ctx is done.
func RunConsumer(ctx context.Context, config Config) error {
	return run(ctx, config, "consumer", (*process).startConsumer)
}

// RunAll does all of this in one process, until ctx is done.
func RunAll(ctx context.Context, config Config) error {
	return run(ctx, config, "all", (*process).startRelay, (*process).startConsumer, (*process).startAPI, (*process).startConsole)
}

// process is what the parts of one process share.
type process struct {
	config    Config
	edge      *edge
	name      string
	telemetry *telemetry.Providers
	db        *pgxpool.Pool
	relayDB   *pgxpool.Pool
	readyDB   *pgxpool.Pool // for readiness alone: see openReadiness
	broker    *rabbit.Gauge // the same of the broker, or nil
	bell      *outbox.NotifyBell
	gate      *outbox.Gate
	changes   *changes.Hub
	calls     *operations.Operations
	keys      *idempotency.Keys
	domain    domain
	// remembered runs a part that needs an inbox which remembers for long enough; see whenRemembered.
	remembered func(part func(context.Context) error) error
	checks     []rpcserver.Check
	group      *errgroup.Group
}

// relayConns is more than a relay with a few shards uses at once: for each shard a connection for pages and one to read ahead, now and then one for
// its lease, and one for the chores. A relay with more shards waits a moment for a free one.
const relayConns = 8

// part starts one part of a process in p.group.
type part func(p *process, ctx context.Context)

func run(ctx context.Context, config Config, name string, parts ...part) error {
	edge, err := newEdge(config.Edge)
	if err != nil {
		return err
	}
	tell, err := telemetry.Start(ctx, telemetry.Config{Service: ServiceName, Process: name, Version: config.Version, Exporter: config.Spans})
	if err != nil {
		return err
	}
	defer func() { // last, when there is nothing more to tell of
		if err := tell.Stop(ctx); err != nil {
			slog.WarnContext(ctx, "last spans not exported", "error", err)
		}
	}()
	p := &process{config: config, edge: edge, name: name, telemetry: tell}
	if err := p.openPools(ctx); err != nil {
		return err
	}
	defer p.closePools()
	p.group, ctx = errgroup.WithContext(ctx)
	config.HighWater.MeterProvider = tell.Meter
	if config.domain == nil {
		config.domain = defaultDomain
	}
	p.bell, p.gate = outbox.NewNotifyBell(config.notifyURL()), outbox.NewGate(p.db, config.HighWater)
	p.changes = changes.New(changes.Config{NotifyURL: config.notifyURL(), ListenURL: config.listenURL()})
	writer := outbox.NewWriter(p.db, p.bell, p.gate)
	p.domain = config.domain(p.db, writer, p.changes)
	p.newCalls(writer)
	p.remembered = whenRemembered(ctx, p.db)
	defer p.ring(ctx)()
	p.checks = p.databaseChecks()
	for _, start := range parts {
		start(p, ctx)
	}
	stopOps, failed := p.startOps(ctx) // last: by now the parts have said what they need
	if failed != nil {
		p.group.Go(func() error { return failed }) // which ends the parts
	}
	defer stopOps()
	p.group.Go(func() error { p.bell.Run(ctx); return nil })
	slog.InfoContext(ctx, "started", "process", name, "addr", config.Addr, "ops_addr", config.OpsAddr, "pid", os.Getpid())
	err = p.group.Wait()
	slog.InfoContext(ctx, "stopped", "process", name)
	return err
}

func (p *process) openPools(ctx context.Context) (err error) {
	config := postgres.Config{
		URL: p.config.PostgresURL, MaxConns: p.config.MaxConns, ApplicationName: ServiceName + " " + p.name, TracerProvider: p.telemetry.Tracer,
	}
	if p.db, err = postgres.Open(ctx, config); err != nil {
		return err
	}
	// The relay has connections of its own: a service whose pool is exhausted must still be able to drain. What it does belongs to no trace.
	p.relayDB, err = postgres.Open(ctx, postgres.Config{
		URL: p.config.PostgresURL, MaxConns: relayConns, ApplicationName: ServiceName + " relay", GenericPlans: true,
		// Another relay that takes over must not wait for a row that this one has locked and, frozen, does not let go.
		IdleInTransaction: p.config.Relay.Lease,
	})
	if err != nil {
		p.db.Close()
		return err
	}
	if err := p.openReadiness(ctx); err != nil {
		p.relayDB.Close()
		p.db.Close()
		return err
	}
	return postgres.ObservePool(p.db, p.name, p.telemetry.Meter)
}

func (p *process) closePools() {
	p.readyDB.Close()
	if p.broker != nil {
		p.broker.Close()
	}
	p.relayDB.Close()
	p.db.Close()
}

// ring tells other processes of changes until the function that it returns is called: after everything else, for what is committed while the
// process drains is told of as well.
func (p *process) ring(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var ringing sync.WaitGroup
	ringing.Go(func() { p.changes.Ring(ctx) })
	return func() { cancel(); ringing.Wait() }
}

// listenURL is where LISTEN works: "" if there is only a pooler in transaction mode, when the relay polls.
func (c Config) listenURL() string {
	if c.ListenURL != "" {
		return c.ListenURL
	}
	if parsed, err := pgx.ParseConfig(c.PostgresURL); err != nil || session.IsPooled(parsed) {
		return ""
	}
	return c.PostgresURL
}

// notifyURL is where NOTIFY works, which is everywhere.
func (c Config) notifyURL() string { return cmp.Or(c.listenURL(), c.PostgresURL) }

// connectionName is what the broker's operators see.
func (p *process) connectionName(part string) string {
	host, _ := os.Hostname()
	return fmt.Sprintf("%s %s on %s/%d", ServiceName, part, host, os.Getpid())
}

func (p *process) startAPI(ctx context.Context) {
	p.startEdge(ctx)
	p.serve(ctx, p.domain.register, p.calls.Register)
	p.group.Go(func() error { p.keys.Run(ctx); return nil })
	p.group.Go(func() error { p.gate.Run(ctx); return nil })
	p.group.Go(func() error { p.changes.Follow(ctx); return nil })
	if p.config.RPCOverRabbitMQ {
		p.startQueueAPI(ctx)
	}
}

// serve serves the given services.
func (p *process) serve(ctx context.Context, register ...func(*connect.Server)) {
	p.listen(ctx, p.newServer(register...))
}

// listen serves a server in the group. It listens before it returns, so that a process that says it is ready can be called.
func (p *process) listen(ctx context.Context, server *rpcserver.Server) {
	listener, err := server.Listen(ctx)
	p.group.Go(func() error {
		if err != nil {
			return err
		}
		return server.Serve(ctx, listener)
	})
}

// startOps serves the operators' port until stop is called, which is after the parts have ended: probes are answered while they drain.
func (p *process) startOps(ctx context.Context) (stop func(), err error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", cmp.Or(p.config.OpsAddr, "127.0.0.1:0"))
	if err != nil {
		return func() {}, fmt.Errorf("listen for operators: %w", err)
	}
	ops := rpcserver.NewOps(rpcserver.OpsConfig{Checks: p.checks, Metrics: p.telemetry.Metrics})
	ended, served := make(chan struct{}), make(chan struct{})
	var failed error // once served is closed
	go func() {
		defer close(served)
		failed = ops.Serve(ctx, listener, ended)
	}()
	p.group.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case <-served: // too soon
			return failed
		}
	})
	return func() { close(ended); <-served }, nil
}
