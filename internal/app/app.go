// Package app wires the processes: which parts each one runs, and with which dependencies. Only here do the packages of
// the database (outbox, inbox) and of the broker (rabbit) meet.
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

// Config configures the processes. cmd/shop fills it from flags and the environment.
type Config struct {
	PostgresURL string
	// ListenURL is a direct connection to the same database, for LISTEN, which a transaction-mode pooler does not
	// support. The default is PostgresURL; if that is such a pooler (see postgres.Config), the relay polls.
	ListenURL string
	AMQPURL   string
	// ManagementURL is RabbitMQ's management API, for operators; "" for none.
	ManagementURL string
	// Exchange is the topic exchange for events.
	Exchange string
	// TopologyGiven means that the exchange and the queues exist, so the processes need no permission to declare them.
	TopologyGiven bool
	// Addr is where the API listens. Relay and consumer ignore it.
	Addr string
	// OpsAddr is where the process answers probes and scrapes: /healthz, /readyz, /metrics. The default is a free port
	// of the loopback interface.
	OpsAddr string
	// MaxConns bounds the connections of one process to Postgres.
	MaxConns int32
	Relay    outbox.Config
	// HighWater is the backlog at which the API refuses writes.
	HighWater outbox.GateConfig
	// Prefetch and Batch configure the consumers; see rabbit.ConsumerConfig.
	Prefetch int
	Batch    int
	// Version is the program's version in telemetry.
	Version string
	// Spans receives the spans in tests, instead of the collector that the environment names.
	Spans sdktrace.SpanExporter
	// Edge configures who may call the API, and the limits of calls.
	Edge Edge
	// Domain is the domain's own configuration. It is nil in a process that neither serves calls nor handles messages.
	Domain *DomainConfig
	Features

	// domain makes the domain. The default is defaultDomain; tests of the core bring their own, since a new service may
	// have none.
	domain func(deps) (domain, error)
}

// WithServices returns the config with the given services instead of the domain, and no consumer groups. It is for
// tests of the processes themselves.
func (c Config) WithServices(register func(*connect.Server)) Config {
	c.domain = func(deps) (domain, error) { return domain{register: register}, nil }
	return c
}

// defaultDomain is newDomain, or its replacement in probes.go.
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

// RunAll runs all parts in one process until ctx is done.
func RunAll(ctx context.Context, config Config) error {
	return run(ctx, config, "all",
		(*process).startRelay, (*process).startConsumer, (*process).startAPI, (*process).startAllFeatures)
}

// process is the state that the parts of one process share.
type process struct {
	config    Config
	edge      *edge
	name      string
	telemetry *telemetry.Providers
	db        *pgxpool.Pool
	relayDB   *pgxpool.Pool
	readyDB   *pgxpool.Pool // only for readiness: see openReadiness
	broker    *rabbit.Gauge // only for readiness; nil if it does not depend on the broker
	bell      *outbox.NotifyBell
	gate      *outbox.Gate
	changes   *changes.Hub
	out       *outbox.Writer
	keys      *idempotency.Keys
	domain    domain
	closers   []func() // of the domain's clients
	features  []feature
	publishes []string // the proto packages of the service's messages; see packages
	shared    shared
	// afterCheck runs a part once the database has passed the checks that parts with an inbox or outbox need; see
	// afterDatabaseCheck.
	afterCheck func(part func(context.Context) error) error
	checks     []rpcserver.Check
	group      *errgroup.Group
}

// relayConns is more than a relay with a few shards uses at once: one connection per shard for pages, one to read
// ahead, one at times for its lease, and one in all for maintenance. A relay with more shards waits briefly for a free
// one.
const relayConns = 8

// part starts one part of a process in p.group.
type part func(p *process, ctx context.Context)

func run(ctx context.Context, config Config, name string, parts ...part) error {
	edge, err := newEdge(config.Edge)
	if err != nil {
		return err
	}
	providers, err := telemetry.Start(ctx, telemetry.Config{
		Service: ServiceName, Process: name, Version: config.Version, Exporter: config.Spans,
	})
	if err != nil {
		return err
	}
	defer func() { // last, so that it exports the spans of everything else
		if err := providers.Stop(ctx); err != nil {
			slog.WarnContext(ctx, "cannot export the last spans", "error", err)
		}
	}()
	p := &process{config: config, edge: edge, name: name, telemetry: providers}
	if err := p.openPools(ctx); err != nil {
		return err
	}
	defer p.closePools()
	p.group, ctx = errgroup.WithContext(ctx)
	config.HighWater.MeterProvider = providers.Meter
	p.bell, p.gate = outbox.NewNotifyBell(config.notifyURL()), outbox.NewGate(p.db, config.HighWater)
	p.changes = changes.New(changes.Config{NotifyURL: config.notifyURL(), ListenURL: config.listenURL()})
	p.out = outbox.NewWriter(p.db, p.bell, p.gate)
	p.keys = idempotency.New(p.db, p.out, idempotency.Config{Caller: callerName})
	if err := p.compose(); err != nil {
		return err
	}
	schema := awaitSchema(ctx, p.db)
	p.group.Go(schema) // ends the process if the schema can never fit it
	p.afterCheck = afterDatabaseCheck(ctx, p.db, schema)
	defer p.ring(ctx)()
	defer p.closeDomain() // before the ring stops, since it may commit
	p.checks = p.databaseChecks()
	for _, start := range parts {
		start(p, ctx)
	}
	stopOps, failed := p.startOps(ctx) // last, since the parts add readiness checks
	if failed != nil {
		p.group.Go(func() error { return failed }) // stops the parts
	}
	defer stopOps()
	p.group.Go(func() error { p.bell.Run(ctx); return nil })
	slog.InfoContext(ctx, "started", "process", name, "addr", config.Addr, "ops_addr", config.OpsAddr,
		"pid", os.Getpid())
	err = p.group.Wait()
	slog.InfoContext(ctx, "stopped", "process", name)
	return err
}

func (p *process) openPools(ctx context.Context) (err error) {
	config := postgres.Config{
		URL: p.config.PostgresURL, MaxConns: p.config.MaxConns, ApplicationName: ServiceName + " " + p.name,
		TracerProvider: p.telemetry.Tracer,
	}
	if p.db, err = postgres.Open(ctx, config); err != nil {
		return err
	}
	// The relay has its own connections, so that it drains the outbox even if calls use up the other pool. Its work
	// belongs to no trace.
	p.relayDB, err = postgres.Open(ctx, postgres.Config{
		URL: p.config.PostgresURL, MaxConns: relayConns, ApplicationName: ServiceName + " relay", GenericPlans: true,
		// A frozen relay must not keep rows locked that the relay that takes over needs.
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

// ring notifies other processes of changes until stop is called. Call stop last: commits while the process drains are
// changes, too.
func (p *process) ring(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var ringing sync.WaitGroup
	ringing.Go(func() { p.changes.Ring(ctx) })
	return func() { cancel(); ringing.Wait() }
}

// listenURL returns a URL on which LISTEN works, or "" if there is only a pooler in transaction mode: then the relay
// polls.
func (c Config) listenURL() string {
	if c.ListenURL != "" {
		return c.ListenURL
	}
	if parsed, err := pgx.ParseConfig(c.PostgresURL); err != nil || session.IsPooled(parsed) {
		return ""
	}
	return c.PostgresURL
}

// notifyURL returns a URL for NOTIFY, which works on any connection.
func (c Config) notifyURL() string { return cmp.Or(c.listenURL(), c.PostgresURL) }

// connectionName returns the name that the broker's operators see.
func (p *process) connectionName(part string) string {
	host, _ := os.Hostname()
	return fmt.Sprintf("%s %s on %s/%d", ServiceName, part, host, os.Getpid())
}

func (p *process) startAPI(ctx context.Context) {
	p.startEdge(ctx)
	p.serve(ctx, p.register)
	p.group.Go(func() error { p.keys.Run(ctx); return nil })
	p.group.Go(func() error { p.gate.Run(ctx); return nil })
	p.group.Go(func() error { p.changes.Follow(ctx); return nil })
	p.startFeatures(ctx, func(f feature) func(context.Context) { return f.startAPI })
}

func (p *process) serve(ctx context.Context, register ...func(*connect.Server)) {
	p.listen(ctx, p.newServer(register...))
}

// listen runs a server in the group. It opens the port before it returns, so that a ready process accepts calls.
func (p *process) listen(ctx context.Context, server *rpcserver.Server) {
	listener, err := server.Listen(ctx)
	p.group.Go(func() error {
		if err != nil {
			return err
		}
		return server.Serve(ctx, listener)
	})
}

// startOps serves the operators' port until stop is called. Call stop after the parts have ended, so that the process
// answers probes while they drain.
func (p *process) startOps(ctx context.Context) (stop func(), err error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", cmp.Or(p.config.OpsAddr, "127.0.0.1:0"))
	if err != nil {
		return func() {}, fmt.Errorf("listen on the operators' port: %w", err)
	}
	ops := rpcserver.NewOps(rpcserver.OpsConfig{Checks: p.checks, Metrics: p.telemetry.Metrics})
	ended, served := make(chan struct{}), make(chan struct{})
	var failed error // set before served is closed
	go func() {
		defer close(served)
		failed = ops.Serve(ctx, listener, ended)
	}()
	p.group.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case <-served: // ended before the parts
			return failed
		}
	})
	return func() { close(ended); <-served }, nil
}
