// Command shop is the service: one binary, one process a subcommand.
package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"example.com/shop/internal/app"
	"example.com/shop/internal/bounds"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/rabbit"
	"example.com/shop/internal/telemetry"
	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/alecthomas/kong"
	"github.com/jackc/pgx/v5"
)

// version is set by the linker; without it the build info says what there is to say.
var version = ""

// cli is every flag and environment variable of the service.
type cli struct {
	LogLevel  slog.Level `env:"LOG_LEVEL" default:"info" help:"Least level that is logged: debug, info, warn, error."`
	LogFormat string     `env:"LOG_FORMAT" default:"text" enum:"text,json" help:"text or json."`

	API         apiCommand         `cmd:"" name:"api" help:"Serve the RPCs (Connect, gRPC, gRPC-Web)."`
	Relay       relayCommand       `cmd:"" help:"Publish the outbox to RabbitMQ."`
	Consumer    consumerCommand    `cmd:"" help:"Run the consumer groups."`
	Console     consoleCommand     `cmd:"" help:"Serve the operators' console."`
	All         allCommand         `cmd:"" help:"API, relay, consumers and console in one process."`
	Migrate     migrateCommand     `cmd:"" help:"Bring the database's schema up to date."`
	Topology    topologyCommand    `cmd:"" help:"Show what the service needs on the broker and which permissions, or declare it."`
	Outbox      outboxCommand      `cmd:"" help:"Look after the outbox."`
	Dead        deadCommand        `cmd:"" help:"Look after dead letters: messages that could not be published or applied."`
	Trace       traceCommand       `cmd:"" help:"Follow one message."`
	Doctor      doctorCommand      `cmd:"" help:"Check the database, the broker and the service; exit 1 if something is wrong, or a check could not be made."`
	APIKey      apiKeyCommand      `cmd:"" name:"apikey" help:"Make an API key."`
	Healthcheck healthcheckCommand `cmd:"" help:"Ask a running process whether it is ready; exit 1 if not."`
	RPC         rpcCommands        `cmd:"" name:"rpc" help:"Call services, and see who serves them over RabbitMQ."`
	Version     versionCommand     `cmd:"" help:"Print the version."`
}

type databaseFlags struct {
	PostgresURL postgresURL `name:"postgres-url" env:"POSTGRES_URL" required:"" help:"Postgres to work on (URL or libpq keywords)."`
	MaxConns    int32       `env:"POSTGRES_MAX_CONNS" default:"10" help:"Most connections of this process to Postgres, 3 to 1000."`
	ListenURL   postgresURL `name:"postgres-listen-url" env:"POSTGRES_LISTEN_URL" help:"Direct connection to the same database for LISTEN/NOTIFY, if the other one is a transaction-mode pooler."`
}

type brokerFlags struct {
	AMQPURL  amqpURL `name:"amqp-url" env:"AMQP_URL" required:"" help:"RabbitMQ and vhost to work on."`
	Exchange string  `env:"EXCHANGE" default:"events" help:"Topic exchange that events are published to."`
	Topology string  `env:"TOPOLOGY" default:"declare" enum:"declare,given" help:"Whether the process declares exchange and queues, or expects them to be given (${enum})."`
}

// managementFlags are for those who look at more of the broker than AMQP shows.
type managementFlags struct {
	ManagementURL managementURL `name:"management-url" env:"RABBITMQ_MANAGEMENT_URL" help:"RabbitMQ's management API, to look for policies that lose messages. Its user needs the tag management."`
}

type apiFlags struct {
	MaxBacklog    int64         `env:"MAX_BACKLOG" default:"1000000" help:"Messages waiting for the broker from which on the API answers resource_exhausted, before it writes; 0 for no limit."`
	MaxBacklogAge time.Duration `env:"MAX_BACKLOG_AGE" default:"0s" help:"Age of the oldest message waiting for the broker, likewise; 0s for no limit."`
}

type relayFlags struct {
	PageRows     int           `env:"RELAY_PAGE_ROWS" default:"1000" help:"Most messages of one page, 1 to 5000. A crash of the relay repeats at most two pages."`
	Lease        time.Duration `env:"RELAY_LEASE" default:"5s" help:"How long a relay that went silent keeps its shard, 1s to 5m."`
	PollInterval time.Duration `env:"RELAY_POLL_INTERVAL" default:"1s" help:"Longest time between two looks at the outbox when no doorbell rings, 10ms to 1m."`
	Retention    time.Duration `env:"OUTBOX_RETENTION" default:"24h" help:"How long delivered messages are kept for replay at least, 1m to 32h."`
}

type callFlags struct {
	CallKeys []signingKey `env:"CALL_KEYS" help:"Keys that sign the callers of durable calls, the same for api and consumer: base64 of 32 bytes or more, the newest first."`
}

// keys returns the keys as they are used.
func (f *callFlags) keys() (keys [][]byte) {
	for _, key := range f.CallKeys {
		keys = append(keys, key)
	}
	return keys
}

type consumerFlags struct {
	Prefetch int `env:"CONSUMER_PREFETCH" default:"300" help:"Most unacked deliveries of one consumer group, 1 to 10000."`
	Batch    int `env:"CONSUMER_BATCH" default:"100" help:"Most deliveries applied in one transaction, 1 to 1000."`

	CallConcurrency int            `env:"CALL_CONCURRENCY" default:"0" help:"Most durable calls executed at once, 1 to half of the connections to Postgres; 0 for one less than half."`
	CallLimit       map[string]int `env:"CALL_LIMIT" placeholder:"METHOD=N" mapsep:"," help:"The same for single methods, such as orders.v1.OrderService/SetStock=1."`
}

// rpcFlags are about serving the RPCs from queues.
type rpcFlags struct {
	RPCOverRabbitMQ bool `name:"rpc-over-rabbitmq" env:"RPC_OVER_RABBITMQ" help:"Serve the RPCs over RabbitMQ, too."`
	RPCPrefetch     int  `env:"RPC_PREFETCH" default:"64" help:"Most calls of one service that are executed at once for RabbitMQ, 1 to 10000."`
}

type apiCommand struct {
	Listen    listenAddress `env:"LISTEN" default:"127.0.0.1:8080" help:"Address to serve on."`
	OpsListen listenAddress `env:"OPS_LISTEN" default:"127.0.0.1:9180" help:"Address to answer probes and scrapes on, in plain HTTP: /healthz, /readyz, /metrics."`
	AMQPURL   amqpURL       `name:"amqp-url" env:"AMQP_URL" help:"RabbitMQ and vhost, for --rpc-over-rabbitmq."`
	databaseFlags
	apiFlags
	edgeFlags
	rpcFlags
	callFlags
}

type relayCommand struct {
	OpsListen listenAddress `env:"OPS_LISTEN" default:"127.0.0.1:9181" help:"Address to answer probes and scrapes on, in plain HTTP: /healthz, /readyz, /metrics."`
	databaseFlags
	brokerFlags
	relayFlags
}

// consumerCommand runs the groups, unless one of its commands says what else to do with them.
type consumerCommand struct {
	Run    runConsumersCommand   `cmd:"" default:"withargs" help:"Run the consumer groups."`
	Ls     consumerLsCommand     `cmd:"" help:"List the groups, and the keys that are blocked."`
	Pause  consumerPauseCommand  `cmd:"" help:"Have a group take no more messages."`
	Resume consumerResumeCommand `cmd:"" help:"Let it go on."`
	Skip   consumerSkipCommand   `cmd:"" help:"Move the message that a blocked key waits for to the dead letters."`
	Park   consumerParkCommand   `cmd:"" help:"Move all that waits on a key to the dead letters."`
}

type runConsumersCommand struct {
	OpsListen listenAddress `env:"OPS_LISTEN" default:"127.0.0.1:9182" help:"Address to answer probes and scrapes on, in plain HTTP: /healthz, /readyz, /metrics."`
	databaseFlags
	brokerFlags
	consumerFlags
	callFlags
}

type allCommand struct {
	Listen      listenAddress   `env:"LISTEN" default:"127.0.0.1:8080" help:"Address to serve on."`
	OpsListen   listenAddress   `env:"OPS_LISTEN" default:"127.0.0.1:9180" help:"Address to answer probes and scrapes on, in plain HTTP: /healthz, /readyz, /metrics."`
	ConsoleAddr optionalAddress `env:"CONSOLE_ADDR" default:"127.0.0.1:8090" help:"Address to serve the operators' console on; empty for none."`
	databaseFlags
	apiFlags
	edgeFlags
	brokerFlags
	relayFlags
	consumerFlags
	rpcFlags
	callFlags
	managementFlags
}

func (c *apiCommand) Run(ctx context.Context) error {
	config := appConfig(c.OpsListen, c.databaseFlags, c.apiFlags, brokerFlags{AMQPURL: c.AMQPURL}, relayFlags{}, consumerFlags{})
	config.Addr, config.Edge, config.Calls.Keys = string(c.Listen), c.edgeFlags.config(), c.keys()
	c.rpcFlags.set(&config)
	return app.RunAPI(ctx, config)
}

func (c *relayCommand) Run(ctx context.Context) error {
	return app.RunRelay(ctx, appConfig(c.OpsListen, c.databaseFlags, apiFlags{}, c.brokerFlags, c.relayFlags, consumerFlags{}))
}

func (c *runConsumersCommand) Run(ctx context.Context) error {
	config := appConfig(c.OpsListen, c.databaseFlags, apiFlags{}, c.brokerFlags, relayFlags{}, c.consumerFlags)
	config.Calls.Keys = c.keys()
	return app.RunConsumer(ctx, config)
}

func (c *allCommand) Run(ctx context.Context) error {
	config := appConfig(c.OpsListen, c.databaseFlags, c.apiFlags, c.brokerFlags, c.relayFlags, c.consumerFlags)
	config.Addr, config.Edge, config.Calls.Keys = string(c.Listen), c.edgeFlags.config(), c.keys()
	c.rpcFlags.set(&config)
	config.ConsoleAddr, config.ManagementURL = string(c.ConsoleAddr), string(c.ManagementURL)
	return app.RunAll(ctx, config)
}

func (f *rpcFlags) set(config *app.Config) {
	config.RPCOverRabbitMQ, config.RPCPrefetch = f.RPCOverRabbitMQ, f.RPCPrefetch
}

func appConfig(ops listenAddress, db databaseFlags, api apiFlags, broker brokerFlags, relay relayFlags, consumer consumerFlags) app.Config {
	return app.Config{
		OpsAddr: string(ops), PostgresURL: string(db.PostgresURL), ListenURL: string(db.ListenURL), MaxConns: db.MaxConns,
		HighWater: outbox.GateConfig{MaxMessages: api.MaxBacklog, MaxAge: api.MaxBacklogAge},
		AMQPURL:   string(broker.AMQPURL), Exchange: broker.Exchange, TopologyGiven: broker.Topology == "given",
		Relay:    outbox.Config{PageRows: relay.PageRows, Lease: relay.Lease, PollInterval: relay.PollInterval, Retention: relay.Retention},
		Prefetch: consumer.Prefetch, Batch: consumer.Batch, Version: buildVersion(),
		Calls: app.Calls{Concurrency: consumer.CallConcurrency, Limits: consumer.CallLimit},
	}
}

type healthcheckCommand struct {
	URL     string        `arg:"" optional:"" default:"http://127.0.0.1:9180/readyz" help:"The process's readiness URL, on its operators' port."`
	Timeout time.Duration `default:"3s" help:"How long to wait for the answer."`
}

func (c *healthcheckCommand) Run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL, nil)
	if err != nil {
		return fmt.Errorf("health check: %w", err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return fmt.Errorf("health check: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s is not ready: %s", c.URL, response.Status)
	}
	return nil
}

type versionCommand struct{}

func (c *versionCommand) Run() error {
	fmt.Println(app.ServiceName, buildVersion())
	return nil
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "development"
}

func newParser(flags *cli) *kong.Kong {
	return kong.Must(flags, kong.Name(app.ServiceName), kong.Vars{"causes": causes()},
		kong.Description("RPCs over Connect and RabbitMQ, with a transactional outbox."))
}

func main() {
	var flags cli
	command, err := newParser(&flags).Parse(os.Args[1:])
	if err != nil {
		fail(2, withoutSecrets(err.Error()))
	}
	log := telemetry.NewLogger(os.Stderr, flags.LogFormat, flags.LogLevel)
	slog.SetDefault(log)
	telemetry.HandleErrors(log)

	limitMemory(log)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills
	command.BindTo(ctx, (*context.Context)(nil))
	if err := command.Run(); errors.As(err, new(usageError)) {
		fail(2, err.Error())
	} else if err != nil {
		fail(1, err.Error())
	}
}

// limitMemory has the garbage collector keep the process within its cgroup, with a tenth to spare for what is not Go's. GOMEMLIMIT, if set,
// counts more. Without either there is no limit.
func limitMemory(log *slog.Logger) {
	if _, err := memlimit.Set(); err != nil && !errors.Is(err, memlimit.ErrNoCgroup) && !errors.Is(err, memlimit.ErrCgroupsNotSupported) {
		log.Warn("no memory limit is known", "error", err)
	}
}

func fail(status int, text string) {
	text = bounds.URLs(strings.Join(strings.Fields(text), " ")) // drivers break lines
	fmt.Fprintf(os.Stderr, "%s: %s\n", app.ServiceName, text)
	os.Exit(status)
}

// withoutSecrets keeps the values of variables that hold passwords out of error texts: kong quotes the value that it could not use.
func withoutSecrets(text string) string {
	for _, name := range []string{"POSTGRES_URL", "POSTGRES_LISTEN_URL", "AMQP_URL", "RABBITMQ_MANAGEMENT_URL", "API_KEYS", "CALL_KEYS"} {
		if value := os.Getenv(name); value != "" {
			text = strings.ReplaceAll(text, fmt.Sprintf("%q", value), "…")
			text = strings.ReplaceAll(text, value, "…")
		}
	}
	return text
}

// postgresURL is checked when flags are read, so that a typo is one line at the start and not an endless retry.
type postgresURL string

func (u *postgresURL) UnmarshalText(text []byte) error {
	if _, err := pgx.ParseConfig(string(text)); err != nil {
		return errors.New("not a Postgres URL or connection string, such as postgres://user:password@host:5432/database")
	}
	*u = postgresURL(text)
	return nil
}

// signingKey is a secret; its error does not show it.
type signingKey []byte

func (k *signingKey) UnmarshalText(text []byte) error {
	key, err := base64.StdEncoding.DecodeString(string(text))
	if err != nil || len(key) < 32 {
		return errors.New("not a key of 32 bytes or more in base64, as `openssl rand -base64 32` makes one")
	}
	*k = key
	return nil
}

// amqpURL is checked likewise. A user without a password gets that of the environment, as libpq has it with PGPASSWORD: a
// script need not escape it.
type amqpURL string

// amqpPassword names the variable.
const amqpPassword = "AMQP_PASSWORD"

func (u *amqpURL) UnmarshalText(text []byte) error {
	if err := rabbit.ValidateURL(string(text)); err != nil {
		return errors.New("not an AMQP URL, such as amqp://user:password@host:5672/vhost")
	}
	whole, err := rabbit.WithPassword(string(text), os.Getenv(amqpPassword))
	*u = amqpURL(whole)
	return err
}

// managementURL is the URL of RabbitMQ's management API; its error does not show it.
type managementURL string

func (u *managementURL) UnmarshalText(text []byte) error {
	if err := rabbit.ValidateManagementURL(string(text)); err != nil && len(text) > 0 {
		return errors.New("not the URL of RabbitMQ's management API, such as http://host:15672")
	}
	whole, err := rabbit.WithPassword(string(text), os.Getenv(amqpPassword))
	*u = managementURL(whole)
	return err
}
