// Command shop is the service: one binary with a subcommand for each process.
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

// version is set by the linker; the default comes from the build info.
var version = ""

// cli is every flag and environment variable of the service.
type cli struct {
	LogLevel  slog.Level `env:"LOG_LEVEL" default:"info" help:"Lowest level to log: debug, info, warn, error."`
	LogFormat string     `env:"LOG_FORMAT" default:"text" enum:"text,json" help:"Log format: text or json."`

	API         apiCommand         `cmd:"" name:"api" help:"Serve the RPCs (Connect, gRPC, gRPC-Web)."`
	Relay       relayCommand       `cmd:"" help:"Publish the outbox to RabbitMQ."`
	Consumer    consumerCommand    `cmd:"" help:"Run the consumer groups."`
	Console     consoleCommand     `cmd:"" help:"Serve the operators' console."`
	All         allCommand         `cmd:"" help:"Run API, relay, consumers and console in one process."`
	Migrate     migrateCommand     `cmd:"" help:"Migrate the database schema."`
	Topology    topologyCommand    `cmd:"" help:"${topology}"`
	Outbox      outboxCommand      `cmd:"" help:"Inspect, replay, reshard or repair the outbox."`
	Dead        deadCommand        `cmd:"" help:"Resolve dead letters: messages that could not be published or applied."`
	Trace       traceCommand       `cmd:"" help:"Trace one message."`
	Doctor      doctorCommand      `cmd:"" help:"${doctor}"`
	APIKey      apiKeyCommand      `cmd:"" name:"apikey" help:"Create an API key."`
	Healthcheck healthcheckCommand `cmd:"" help:"Check whether a running process is ready; exit 1 if not."`
	RPC         rpcCommands        `cmd:"" name:"rpc" help:"Call services, or list those served over RabbitMQ."`
	Version     versionCommand     `cmd:"" help:"Print the version."`
}

type databaseFlags struct {
	PostgresURL postgresURL `name:"postgres-url" env:"POSTGRES_URL" required:"" help:"Postgres URL or libpq keywords."`
	MaxConns    int32       `env:"POSTGRES_MAX_CONNS" default:"10" help:"${max_conns}"`
	ListenURL   postgresURL `name:"postgres-listen-url" env:"POSTGRES_LISTEN_URL" help:"${listen_url}"`
}

type brokerFlags struct {
	AMQPURL  amqpURL `name:"amqp-url" env:"AMQP_URL" required:"" help:"RabbitMQ URL with its vhost."`
	Exchange string  `env:"EXCHANGE" default:"events" help:"Topic exchange for events."`
	Topology string  `env:"TOPOLOGY" default:"declare" enum:"declare,given" help:"${topology_mode}"`
}

// managementFlags give access to what AMQP does not show of the broker.
type managementFlags struct {
	ManagementURL managementURL `name:"management-url" env:"RABBITMQ_MANAGEMENT_URL" help:"${management_url}"`
}

type apiFlags struct {
	MaxBacklog    int64         `env:"MAX_BACKLOG" default:"1000000" help:"${max_backlog}"`
	MaxBacklogAge time.Duration `env:"MAX_BACKLOG_AGE" default:"0s" help:"${max_backlog_age}"`
}

type relayFlags struct {
	PageRows     int           `env:"RELAY_PAGE_ROWS" default:"1000" help:"${page_rows}"`
	Lease        time.Duration `env:"RELAY_LEASE" default:"5s" help:"How long a silent relay keeps its shard, 1s to 5m."`
	PollInterval time.Duration `env:"RELAY_POLL_INTERVAL" default:"1s" help:"${poll_interval}"`
	Retention    time.Duration `env:"OUTBOX_RETENTION" default:"24h" help:"${retention}"`
}

type callFlags struct {
	CallKeys []signingKey `env:"CALL_KEYS" help:"${call_keys}"`
}

func (f *callFlags) keys() (keys [][]byte) {
	for _, key := range f.CallKeys {
		keys = append(keys, key)
	}
	return keys
}

type consumerFlags struct {
	Prefetch int `env:"CONSUMER_PREFETCH" default:"300" help:"Maximum unacked deliveries per group, 1 to 10000."`
	Batch    int `env:"CONSUMER_BATCH" default:"100" help:"Maximum deliveries per transaction, 1 to 1000."`

	CallConcurrency int            `env:"CALL_CONCURRENCY" default:"0" help:"${call_concurrency}"`
	CallLimit       map[string]int `env:"CALL_LIMIT" placeholder:"METHOD=N" mapsep:"," help:"${call_limit}"`
}

// rpcFlags are the flags for serving RPCs from queues.
type rpcFlags struct {
	RPCOverRabbitMQ bool `name:"rpc-over-rabbitmq" env:"RPC_OVER_RABBITMQ" help:"Also serve the RPCs over RabbitMQ."`
	RPCPrefetch     int  `env:"RPC_PREFETCH" default:"64" help:"${rpc_prefetch}"`
}

type apiCommand struct {
	Listen    listenAddress `env:"LISTEN" default:"127.0.0.1:8080" help:"Address to serve on."`
	OpsListen listenAddress `env:"OPS_LISTEN" default:"127.0.0.1:9180" help:"${ops_listen}"`
	AMQPURL   amqpURL       `name:"amqp-url" env:"AMQP_URL" help:"RabbitMQ URL with its vhost, for --rpc-over-rabbitmq."`
	databaseFlags
	apiFlags
	edgeFlags
	rpcFlags
	callFlags
}

type relayCommand struct {
	OpsListen listenAddress `env:"OPS_LISTEN" default:"127.0.0.1:9181" help:"${ops_listen}"`
	databaseFlags
	brokerFlags
	relayFlags
}

// consumerCommand runs the consumer groups by default; its other commands manage them.
type consumerCommand struct {
	Run    runConsumersCommand   `cmd:"" default:"withargs" help:"Run the consumer groups."`
	Ls     consumerLsCommand     `cmd:"" help:"List the groups and the blocked keys."`
	Pause  consumerPauseCommand  `cmd:"" help:"Pause a group: it takes no more messages."`
	Resume consumerResumeCommand `cmd:"" help:"Resume a paused group."`
	Skip   consumerSkipCommand   `cmd:"" help:"Move the first message of a blocked key to the dead letters."`
	Park   consumerParkCommand   `cmd:"" help:"Move all waiting messages of a key to the dead letters."`
}

type runConsumersCommand struct {
	OpsListen listenAddress `env:"OPS_LISTEN" default:"127.0.0.1:9182" help:"${ops_listen}"`
	databaseFlags
	brokerFlags
	consumerFlags
	callFlags
}

type allCommand struct {
	Listen      listenAddress   `env:"LISTEN" default:"127.0.0.1:8080" help:"Address to serve on."`
	OpsListen   listenAddress   `env:"OPS_LISTEN" default:"127.0.0.1:9180" help:"${ops_listen}"`
	ConsoleAddr optionalAddress `env:"CONSOLE_ADDR" default:"127.0.0.1:8090" help:"${console_addr}"`
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
	broker := brokerFlags{AMQPURL: c.AMQPURL}
	config := appConfig(c.OpsListen, c.databaseFlags, c.apiFlags, broker, relayFlags{}, consumerFlags{})
	config.Addr, config.Edge, config.Calls.Keys = string(c.Listen), c.edgeFlags.config(), c.keys()
	c.rpcFlags.set(&config)
	return app.RunAPI(ctx, config)
}

func (c *relayCommand) Run(ctx context.Context) error {
	config := appConfig(c.OpsListen, c.databaseFlags, apiFlags{}, c.brokerFlags, c.relayFlags, consumerFlags{})
	return app.RunRelay(ctx, config)
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

func appConfig(
	ops listenAddress, db databaseFlags, api apiFlags, broker brokerFlags, relay relayFlags, consumer consumerFlags,
) app.Config {
	return app.Config{
		OpsAddr: string(ops), PostgresURL: string(db.PostgresURL), ListenURL: string(db.ListenURL), MaxConns: db.MaxConns,
		HighWater: outbox.GateConfig{MaxMessages: api.MaxBacklog, MaxAge: api.MaxBacklogAge},
		AMQPURL:   string(broker.AMQPURL), Exchange: broker.Exchange, TopologyGiven: broker.Topology == "given",
		Relay: outbox.Config{
			PageRows: relay.PageRows, Lease: relay.Lease, PollInterval: relay.PollInterval, Retention: relay.Retention,
		},
		Prefetch: consumer.Prefetch, Batch: consumer.Batch, Version: buildVersion(),
		Calls: app.Calls{Concurrency: consumer.CallConcurrency, Limits: consumer.CallLimit},
	}
}

type healthcheckCommand struct {
	URL     string        `arg:"" optional:"" default:"http://127.0.0.1:9180/readyz" help:"${healthcheck_url}"`
	Timeout time.Duration `default:"3s" help:"How long to wait for the response."`
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
	return kong.Must(flags, kong.Name(app.ServiceName), helpTexts, kong.Vars{"causes": causes()},
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

// limitMemory sets the garbage collector's limit to nine tenths of the cgroup's memory; the rest is for memory that Go
// does not manage. GOMEMLIMIT takes precedence. Without either there is no limit.
func limitMemory(log *slog.Logger) {
	_, err := memlimit.Set()
	if err != nil && !errors.Is(err, memlimit.ErrNoCgroup) && !errors.Is(err, memlimit.ErrCgroupsNotSupported) {
		log.Warn("cannot determine the memory limit", "error", err)
	}
}

func fail(status int, text string) {
	text = bounds.URLs(strings.Join(strings.Fields(text), " ")) // errors of drivers contain line breaks
	fmt.Fprintf(os.Stderr, "%s: %s\n", app.ServiceName, text)
	os.Exit(status)
}

// withoutSecrets removes the values of variables with passwords from an error text: kong quotes the value that it
// rejects.
func withoutSecrets(text string) string {
	for _, name := range []string{
		"POSTGRES_URL", "POSTGRES_LISTEN_URL", "AMQP_URL", "RABBITMQ_MANAGEMENT_URL", "API_KEYS", "CALL_KEYS",
	} {
		if value := os.Getenv(name); value != "" {
			text = strings.ReplaceAll(text, fmt.Sprintf("%q", value), "…")
			text = strings.ReplaceAll(text, value, "…")
		}
	}
	return text
}

// postgresURL is checked when flags are parsed, so that a typo ends the process at once instead of causing endless
// retries.
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
		return errors.New("not a base64 key of 32 bytes or more, as from `openssl rand -base64 32`")
	}
	*k = key
	return nil
}

// amqpURL is checked in the same way. AMQP_PASSWORD provides a missing password, as PGPASSWORD does for libpq, so that
// scripts need not escape it.
type amqpURL string

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
