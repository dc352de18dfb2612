package app

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// logged contains the logs of all processes of this package's tests, at debug level.
var logged lockedBuffer

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// family is a metric family on /metrics.
type family struct{ kind, help string }

var (
	helpLine = regexp.MustCompile(`(?m)^# HELP (\S+) (.*)$`)
	typeLine = regexp.MustCompile(`(?m)^# TYPE (\S+) (\S+)$`)
	// foreign matches metrics of libraries: Go's runtime and the process.
	foreign = regexp.MustCompile(`^(go|process)_|^target_info$`)
)

// web is a client that keeps no connections.
var web = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

func isReady(url string) error {
	response, err := web.Get(url + "/readyz")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("not ready: %s", response.Status)
	}
	return nil
}

func scrape(t *testing.T, url string) (text string, ours map[string]family) {
	t.Helper()
	response, err := web.Get(url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		t.Fatalf("/metrics: %s, %v", response.Status, err)
	}
	text, ours = string(body), map[string]family{}
	for _, found := range typeLine.FindAllStringSubmatch(text, -1) {
		if !foreign.MatchString(found[1]) {
			ours[found[1]] = family{kind: found[2]}
		}
	}
	for _, found := range helpLine.FindAllStringSubmatch(text, -1) {
		if metric, known := ours[found[1]]; known {
			metric.help = found[2]
			ours[found[1]] = metric
		}
	}
	return text, ours
}

const (
	watchedType      = "google.protobuf.StringValue"
	watchedProcedure = "/probe.v1.ProbeService/Say"
)

// watched gives a process a domain of one group and one RPC that fail with errors that quote their input.
func watched(config Config) Config {
	config = probed(config)
	config.Edge.NoAuth = true // the procedure has no proto file to declare its callers
	config.domain = func(deps) (domain, error) {
		failing := inbox.NewGroup("failing")
		inbox.Handle(failing, func(ctx context.Context, tx pgx.Tx, text *wrapperspb.StringValue) error {
			if strings.HasPrefix(text.GetValue(), "panic") {
				panic(text)
			}
			var id uuid.UUID
			return tx.QueryRow(ctx, `SELECT $1::text::uuid`, text.GetValue()).Scan(&id)
		})
		say := connect.Method{
			Spec: connect.Spec{Procedure: watchedProcedure, StreamType: connect.StreamTypeUnary},
			Handler: func(ctx context.Context, _ connect.Spec, stream connect.ServerStream) error {
				var in wrapperspb.StringValue
				if err := stream.Receive(&in); err != nil {
					return err
				}
				panic(&in)
			},
		}
		return domain{register: func(s *connect.Server) { s.Register(say) }, groups: []group{{failing, 1}}}, nil
	}
	return config
}

// commit commits a message with the given type and payload.
func commit(t *testing.T, postgresURL, kind string, payload []byte) {
	t.Helper()
	db, err := postgres.Open(t.Context(), postgres.Config{URL: postgresURL})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	message := messaging.Message{ID: uuid.Must(uuid.NewV7()), Type: kind, Payload: payload}
	err = postgres.Transact(t.Context(), db, func(tx pgx.Tx) error { return outbox.Insert(t.Context(), tx, message) })
	if err != nil {
		t.Fatal(err)
	}
}

func post(t *testing.T, url, body string) (answer string) {
	t.Helper()
	response, err := web.Post(url, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, _ := io.ReadAll(response.Body)
	return string(text)
}

// documented returns the metrics of docs/metrics.md, which has a row for each.
func documented(t *testing.T) map[string]family {
	t.Helper()
	text, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]family{}
	rows := regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\| (\\w+) \\|")
	for _, row := range rows.FindAllStringSubmatch(string(text), -1) {
		found[row[1]] = family{kind: row[2]}
	}
	return found
}

// docs/metrics.md lists exactly the metrics of /metrics. Each has help, and promtool accepts its name.
func TestMetricsAreDocumentedAndClean(t *testing.T) {
	t.Parallel()
	config := watched(Config{PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t)})
	all := start(t, RunAll, config)
	url := all.ops
	var text string
	testenv.Eventually(t, 30*time.Second, func() error { return isReady(url) })
	commit(t, config.PostgresURL, watchedType, nil)
	post(t, all.url+watchedProcedure, "{}")
	docs := documented(t)
	testenv.Eventually(t, 30*time.Second, func() error {
		var shown map[string]family
		text, shown = scrape(t, url)
		missing := maps.Clone(docs)
		for name, metric := range shown {
			switch {
			case metric.help == "":
				t.Errorf("%s has no help", name)
			case docs[name].kind == "":
				t.Errorf("docs/metrics.md does not list %s, a %s: %s", name, metric.kind, metric.help)
			case docs[name].kind != metric.kind:
				t.Errorf("%s is a %s, docs/metrics.md says %s", name, metric.kind, docs[name].kind)
			}
			delete(missing, name)
		}
		if len(missing) > 0 {
			return fmt.Errorf("only docs/metrics.md lists %v", slices.Sorted(maps.Keys(missing)))
		}
		return nil
	})
	checkMetrics(t, text)
}

// checkMetrics runs promtool's linter, which also checks names and units.
func checkMetrics(t *testing.T, text string) {
	t.Helper()
	need(t, "promtool")
	check := exec.CommandContext(t.Context(), "promtool", "check", "metrics")
	check.Stdin = strings.NewReader(text)
	if output, err := check.CombinedOutput(); err != nil || len(output) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, output)
	}
}

// Each process exports the metrics of its own parts.
func TestEachProcessHasMetrics(t *testing.T) {
	t.Parallel()
	config := watched(Config{PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t)})
	for name, process := range map[string]struct {
		run  func(context.Context, Config) error
		want []string
	}{
		"API": {RunAPI, []string{
			"outbox_gate_refusing", "outbox_backlog", "outbox_lag_seconds", "postgres_pool_connections",
		}},
		"Relay": {RunRelay, []string{
			"outbox_published_total", "outbox_lease_held", "postgres_vacuum_held_seconds", "rabbit_connects_total",
		}},
		"Consumer": {RunConsumer, []string{
			"inbox_applied_total", "inbox_blocked_keys", "rabbit_consumers", "rabbit_batches_paused",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := start(t, process.run, config).ops
			testenv.Eventually(t, 30*time.Second, func() error {
				if err := isReady(url); err != nil {
					return err
				}
				text, shown := scrape(t, url)
				for _, name := range append(process.want, "target_info") {
					if shown[name].kind == "" && !strings.Contains(text, name) {
						return fmt.Errorf("%s is missing", name)
					}
				}
				if !strings.Contains(text, `service_name="`+ServiceName+`-`) {
					t.Error("target_info does not name the service")
				}
				return nil
			})
		})
	}
}

// Alert rules and dashboard use only documented metrics.
func TestRulesAndDashboardNameMetricsThatExist(t *testing.T) {
	t.Parallel()
	docs := documented(t)
	for _, path := range []string{"../../deploy/prometheus/alerts.yml", "../../deploy/grafana/dashboard.json"} {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		metrics := regexp.MustCompile(`\b(?:outbox|inbox|dead_letters|rabbit|postgres|rpc_server)_[a-z_]+`)
		names := metrics.FindAllString(string(text), -1)
		if len(names) < 10 {
			t.Errorf("%s: only %d metrics found", path, len(names))
		}
		for _, name := range names {
			base := regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
			if docs[name].kind == "" && docs[base].kind != "histogram" {
				t.Errorf("%s uses %s, which docs/metrics.md does not list", path, name)
			}
		}
	}
}

// Each alert refers to its section of the runbook, which exists.
func TestAlertsHaveRunbooks(t *testing.T) {
	t.Parallel()
	rules, err := os.ReadFile("../../deploy/prometheus/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	runbook, err := os.ReadFile("../../docs/runbook.md")
	if err != nil {
		t.Fatal(err)
	}
	alerts := regexp.MustCompile(`(?m)^ +- alert: (\w+)$`).FindAllStringSubmatch(string(rules), -1)
	if len(alerts) < 10 {
		t.Errorf("only %d alerts found", len(alerts))
	}
	for _, alert := range alerts {
		if !strings.Contains(string(runbook), "\n## "+alert[1]+"\n") {
			t.Errorf("docs/runbook.md has no section %s", alert[1])
		}
		if !strings.Contains(string(rules), "docs/runbook.md#"+strings.ToLower(alert[1])+"\n") {
			t.Errorf("%s does not refer to its section of the runbook", alert[1])
		}
	}
}

// Processes log neither passwords nor payloads, not even at debug level or when connections or handlers fail.
func TestLogsHoldNoSecretsAndNoPayloads(t *testing.T) {
	t.Parallel()
	const canary, secret = "canaryinthepayload", "canaryinthepassword"
	database, postgresURL := testenv.ProxyURL(t, testenv.Login(t, testenv.PostgresURL(t), secret))
	vhost := testenv.AMQP(t)
	broker, amqpURL := testenv.ProxyURL(t, testenv.Management(t, vhost).User(".*", ".*", ".*"))
	amqpSecret := passwordOf(t, amqpURL)
	config := watched(Config{PostgresURL: postgresURL, AMQPURL: amqpURL})
	url := start(t, RunAll, config).url
	wrong := config
	wrong.AMQPURL = withPassword(t, amqpURL, secret)
	start(t, RunConsumer, wrong)
	awaitLog(t, "Exception (403)") // the rest of the text depends on RabbitMQ's version

	text := func(value string) []byte {
		payload, err := proto.Marshal(wrapperspb.String(value))
		if err != nil {
			t.Fatal(err)
		}
		return payload
	}
	commit(t, postgresURL, watchedType, text(canary))                            // the handler returns an error
	commit(t, postgresURL, watchedType, text("panic "+canary))                   // the handler panics
	commit(t, postgresURL, watchedType, append([]byte("\xff"), text(canary)...)) // cannot be decoded
	commit(t, postgresURL, "probe.Nobody", text(canary))                         // unroutable
	awaitLog(t, "SQLSTATE 22P02")
	awaitLog(t, "handler panicked")
	awaitLog(t, "message will be retried")
	awaitLog(t, "reason=undecodable")
	awaitLog(t, "reason=unroutable")

	post(t, url+watchedProcedure, `{"`+canary+`": "`+canary+`"}`)
	post(t, url+watchedProcedure, canary)
	post(t, url+"/"+canary, canary)
	post(t, url+watchedProcedure, `"`+canary+`"`) // the handler panics
	awaitLog(t, "code=invalid_argument")
	awaitLog(t, "rpc panicked")

	broker.Refuse(true)
	broker.Cut()
	database.Refuse(true)
	database.Cut()
	post(t, url+watchedProcedure, `{}`)
	awaitLog(t, "consumer interrupted")
	awaitLog(t, "doorbell connection lost")
	for _, text := range []string{canary, secret, amqpSecret} {
		if line := lineWith(logged.String(), text); line != "" {
			t.Errorf("logged: %s", line)
		}
	}
}

func lineWith(text, part string) string {
	for line := range strings.Lines(text) {
		if strings.Contains(line, part) {
			return line
		}
	}
	return ""
}

func awaitLog(t *testing.T, part string) {
	t.Helper()
	testenv.Eventually(t, 30*time.Second, func() error {
		if lineWith(logged.String(), part) == "" {
			return fmt.Errorf("nothing logged with %q", part)
		}
		return nil
	})
}

func withPassword(t *testing.T, rawURL, password string) string {
	t.Helper()
	parsed, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	parsed.User = url.UserPassword(parsed.User.Username(), password)
	return parsed.String()
}

func passwordOf(t *testing.T, rawURL string) string {
	t.Helper()
	parsed, err := amqp.ParseURI(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	return parsed.Password
}
