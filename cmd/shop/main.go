// Command shop is the service: one binary with a subcommand for each process.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"regexp"
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

	API      apiCommand      `cmd:"" name:"api" help:"Serve the RPCs (Connect, gRPC, gRPC-Web)."`
	Relay    relayCommand    `cmd:"" help:"Publish the outbox to RabbitMQ."`
	Consumer consumerCommand `cmd:"" help:"Run the consumer groups."`
	featureCommands
	All         allCommand         `cmd:"" help:"Run all processes in one."`
	Migrate     migrateCommand     `cmd:"" help:"Migrate the database schema."`
	Topology    topologyCommand    `cmd:"" help:"${topology}"`
	Outbox      outboxCommand      `cmd:"" help:"Inspect, replay, reshard or repair the outbox."`
	Dead        deadCommand        `cmd:"" help:"Resolve dead letters: messages that could not be published or applied."`
	Trace       traceCommand       `cmd:"" help:"Trace one message."`
	Doctor      doctorCommand      `cmd:"" help:"${doctor}"`
	APIKey      apiKeyCommand      `cmd:"" name:"apikey" help:"Create an API key."`
	Healthcheck healthcheckCommand `cmd:"" help:"Check whether a running process is ready; exit 1 if not."`
	RPC         rpcCommands        `cmd:"" name:"rpc" help:"Call the RPCs of a service."`
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

type consumerFlags struct {
	Prefetch int `env:"CONSUMER_PREFETCH" default:"300" help:"Maximum unacked deliveries per group, 1 to 10000."`
	Batch    int `env:"CONSUMER_BATCH" default:"100" help:"Maximum deliveries per transaction, 1 to 1000."`
}

type apiCommand struct {
	Listen    listenAddress `env:"LISTEN" default:"127.0.0.1:8080" help:"Address to serve on."`
	OpsListen listenAddress `env:"OPS_LISTEN" default:"127.0.0.1:9180" help:"${ops_listen}"`
	databaseFlags
	apiFlags
	edgeFlags
	domainFlags
	apiFeatures
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
	domainFlags
	consumerFeatures
}

type allCommand struct {
	Listen    listenAddress `env:"LISTEN" default:"127.0.0.1:8080" help:"Address to serve on."`
	OpsListen listenAddress `env:"OPS_LISTEN" default:"127.0.0.1:9180" help:"${ops_listen}"`
	databaseFlags
	apiFlags
	edgeFlags
	brokerFlags
	relayFlags
	consumerFlags
	domainFlags
	allFeatures
}

// config returns the configuration, or an error of one line if a value is wrong.
func (c *apiCommand) config() (app.Config, error) {
	config := appConfig(c.OpsListen, c.databaseFlags, c.apiFlags, brokerFlags{}, relayFlags{}, consumerFlags{})
	config.Addr, config.Edge = string(c.Listen), c.edgeFlags.config()
	return checked(config, append(c.apiFeatures.all(), &c.domainFlags), &c.databaseFlags, &c.apiFlags, &c.edgeFlags)
}

func (c *relayCommand) config() (app.Config, error) {
	config := appConfig(c.OpsListen, c.databaseFlags, apiFlags{}, c.brokerFlags, c.relayFlags, consumerFlags{})
	return checked(config, nil, &c.databaseFlags, &c.brokerFlags, &c.relayFlags)
}

func (c *runConsumersCommand) config() (app.Config, error) {
	config := appConfig(c.OpsListen, c.databaseFlags, apiFlags{}, c.brokerFlags, relayFlags{}, c.consumerFlags)
	return checked(config, append(c.consumerFeatures.all(), &c.domainFlags),
		&c.databaseFlags, &c.brokerFlags, &c.consumerFlags)
}

func (c *allCommand) config() (app.Config, error) {
	config := appConfig(c.OpsListen, c.databaseFlags, c.apiFlags, c.brokerFlags, c.relayFlags, c.consumerFlags)
	config.Addr, config.Edge = string(c.Listen), c.edgeFlags.config()
	return checked(config, append(c.allFeatures.all(), &c.domainFlags),
		&c.databaseFlags, &c.apiFlags, &c.brokerFlags, &c.relayFlags, &c.consumerFlags, &c.edgeFlags)
}

func (c *apiCommand) Run(ctx context.Context) error { return runWith(ctx, c.config, app.RunAPI) }

func (c *relayCommand) Run(ctx context.Context) error { return runWith(ctx, c.config, app.RunRelay) }

func (c *runConsumersCommand) Run(ctx context.Context) error {
	return runWith(ctx, c.config, app.RunConsumer)
}

func (c *allCommand) Run(ctx context.Context) error { return runWith(ctx, c.config, app.RunAll) }

func runWith(
	ctx context.Context, config func() (app.Config, error), run func(context.Context, app.Config) error,
) error {
	values, err := config() // checked before: see Validate
	if err != nil {
		return err
	}
	return run(ctx, values)
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
	options := []kong.Option{
		kong.Name(app.ServiceName), kong.Description("RPCs with a transactional outbox."),
		helpTexts, kong.Vars{"causes": causes()},
	}
	for _, texts := range featureTexts {
		options = append(options, texts)
	}
	return kong.Must(flags, options...)
}

func main() {
	var flags cli
	parser := newParser(&flags)
	command, err := parser.Parse(os.Args[1:])
	if err != nil {
		fail(2, withoutSecrets(err.Error(), parser.Model))
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

// limitMemory sets the garbage collector's limit to four fifths of the cgroup's memory. The rest is for memory that Go
// does not manage, and for garbage that arrives faster than a busy machine collects it. GOMEMLIMIT takes precedence.
// Without either there is no limit.
func limitMemory(log *slog.Logger) {
	_, err := memlimit.Set(memlimit.WithRatio(0.8))
	if err != nil && !errors.Is(err, memlimit.ErrNoCgroup) && !errors.Is(err, memlimit.ErrCgroupsNotSupported) {
		log.Warn("cannot determine the memory limit", "error", err)
	}
}

func fail(status int, text string) {
	text = bounds.URLs(strings.Join(strings.Fields(text), " ")) // errors of drivers contain line breaks
	fmt.Fprintf(os.Stderr, "%s: %s\n", app.ServiceName, text)
	os.Exit(status)
}

// withoutSecrets removes the values of variables with passwords or keys from an error text: kong quotes the value that
// it rejects.
func withoutSecrets(text string, model *kong.Application) string {
	for _, command := range model.Leaves(false) {
		for _, f := range command.Flags {
			for _, name := range f.Envs {
				if value := os.Getenv(name); value != "" && secretName.MatchString(name) {
					text = strings.ReplaceAll(text, fmt.Sprintf("%q", value), "…")
					text = strings.ReplaceAll(text, value, "…")
				}
			}
		}
	}
	return text
}

// secretName matches the names of variables that contain a secret.
var secretName = regexp.MustCompile(`_(URL|KEYS?|PASSWORD|SECRET|TOKEN)$`)

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
