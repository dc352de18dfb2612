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
	"example.com/shop/internal/changes"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// logged is what all processes of this package's tests have logged, at debug level.
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

// family is a metric as /metrics shows it.
type family struct{ kind, help string }

var (
	helpLine = regexp.MustCompile(`(?m)^# HELP (\S+) (.*)$`)
	typeLine = regexp.MustCompile(`(?m)^# TYPE (\S+) (\S+)$`)
	// foreign are the metrics of the libraries: of Go's runtime and the process.
	foreign = regexp.MustCompile(`^(go|process)_|^target_info$`)
)

// web leaves no connections behind.
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
		if one, known := ours[found[1]]; known {
			one.help = found[2]
			ours[found[1]] = one
		}
	}
	return text, ours
}

const (
	watchedType      = "google.protobuf.StringValue"
	watchedProcedure = "/probe.v1.ProbeService/Say"
)

// watched gives a process a domain of one group and one RPC, that fail with words that quote what they got.
func watched(config Config) Config {
	config = probed(config)
	config.Edge.NoAuth = true // its procedures have no proto file that could open them
	config.domain = func(*pgxpool.Pool, *outbox.Writer, *changes.Hub) domain {
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
		return domain{register: func(s *connect.Server) { s.Register(say) }, groups: []group{{failing, 1}}}
	}
	return config
}

// commit commits a message of any type with any payload.
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

// documented reads docs/metrics.md: a row for each metric.
func documented(t *testing.T) map[string]family {
	t.Helper()
	text, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]family{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\| (\\w+) \\|").FindAllStringSubmatch(string(text), -1) {
		found[row[1]] = family{kind: row[2]}
	}
	return found
}

// What /metrics shows is what docs/metrics.md lists, each with help, in names that promtool has nothing against.
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
		for name, one := range shown {
			switch {
			case one.help == "":
				t.Errorf("%s has no help", name)
			case docs[name].kind == "":
				t.Errorf("docs/metrics.md does not list %s, a %s: %s", name, one.kind, one.help)
			case docs[name].kind != one.kind:
				t.Errorf("%s is a %s, docs/metrics.md says %s", name, one.kind, docs[name].kind)
			}
			delete(missing, name)
		}
		if len(missing) > 0 {
			return fmt.Errorf("docs/metrics.md lists what /metrics does not show: %v", slices.Sorted(maps.Keys(missing)))
		}
		return nil
	})
	checkMetrics(t, text)
}

// checkMetrics runs promtool's linter, which also knows the conventions for names and units.
func checkMetrics(t *testing.T, text string) {
	t.Helper()
	if output, err := exec.Command("bash", "../../scripts/need.sh", "promtool", "prometheus").CombinedOutput(); err != nil {
		t.Fatalf("promtool: %v\n%s", err, output)
	}
	check := exec.CommandContext(t.Context(), "promtool", "check", "metrics")
	check.Stdin = strings.NewReader(text)
	if output, err := check.CombinedOutput(); err != nil || len(output) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, output)
	}
}

// Each process serves its own part.
func TestEachProcessHasMetrics(t *testing.T) {
	t.Parallel()
	config := watched(Config{PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t)})
	for name, process := range map[string]struct {
		run  func(context.Context, Config) error
		want []string
	}{
		"API":      {RunAPI, []string{"outbox_gate_refusing", "outbox_backlog", "outbox_lag_seconds", "postgres_pool_connections"}},
		"Relay":    {RunRelay, []string{"outbox_published_total", "outbox_lease_held", "postgres_vacuum_held_seconds", "rabbit_connects_total"}},
		"Consumer": {RunConsumer, []string{"inbox_applied_total", "inbox_blocked_keys", "rabbit_consumers", "rabbit_batches_paused"}},
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
						return fmt.Errorf("%s is not shown", name)
					}
				}
				if !strings.Contains(text, `service_name="`+ServiceName+`-`) {
					t.Errorf("the process does not say who it is")
				}
				return nil
			})
		})
	}
}

// What rules and dashboard ask for exists.
func TestRulesAndDashboardNameMetricsThatExist(t *testing.T) {
	t.Parallel()
	docs := documented(t)
	for _, path := range []string{"../../deploy/prometheus/alerts.yml", "../../deploy/grafana/dashboard.json"} {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		names := regexp.MustCompile(`\b(?:outbox|inbox|dead_letters|rabbit|postgres|rpc_server)_[a-z_]+`).FindAllString(string(text), -1)
		if len(names) < 10 {
			t.Errorf("%s: only %d metrics found, looking in the wrong place", path, len(names))
		}
		for _, name := range names {
			base := regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
			if docs[name].kind == "" && docs[base].kind != "histogram" {
				t.Errorf("%s names %s, which docs/metrics.md does not know", path, name)
			}
		}
	}
}

// Runbooks that alerts name are there.
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
			t.Errorf("%s does not name its section of the runbook", alert[1])
		}
	}
}

// Neither passwords nor payloads are in what processes log, not even at debug level, when connections fail or handlers do.
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
	awaitLog(t, "Exception (403)") // RabbitMQ 4.3 has other words than older ones

	text := func(value string) []byte {
		payload, err := proto.Marshal(wrapperspb.String(value))
		if err != nil {
			t.Fatal(err)
		}
		return payload
	}
	commit(t, postgresURL, watchedType, text(canary))                            // the handler fails
	commit(t, postgresURL, watchedType, text("panic "+canary))                   // or worse
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
	post(t, url+watchedProcedure, `"`+canary+`"`) // which panics
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
