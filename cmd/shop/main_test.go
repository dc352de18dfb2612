package main

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/shop/internal/app"
	"example.com/shop/internal/dev/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// binary is the program with probes as its domain, and shipped is the program itself. Each is built once.
var (
	binary  = sync.OnceValue(func() string { return build("under-test", "probes") })
	shipped = sync.OnceValue(func() string { return build("shipped-under-test", "") })
)

// build builds into .stack/bin, where the next run replaces the file: testenv.Main offers no hook to remove it.
func build(name, tags string) string {
	path, err := filepath.Abs(filepath.Join("..", "..", ".stack", "bin", name))
	if err != nil {
		panic(err)
	}
	if output, err := exec.Command("go", "build", "-tags", tags, "-o", path, ".").CombinedOutput(); err != nil {
		panic(string(output))
	}
	return path
}

const (
	goodPostgres = "POSTGRES_URL=postgres://u:hunter2@127.0.0.1:1/shop"
	goodAMQP     = "AMQP_URL=amqp://u:hunter2@127.0.0.1:1/"
	goodKeys     = "ann:customer:0000000000000000000000000000000000000000000000000000000000000000"
)

// call runs the program with exactly the given environment.
func call(t *testing.T, environment []string, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	return callProgram(t, binary(), environment, args...)
}

func callProgram(
	t *testing.T, program string, environment []string, args ...string,
) (status int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute) // a process that should have failed runs forever
	defer cancel()
	command := exec.CommandContext(ctx, program, args...)
	var out, errs bytes.Buffer
	// Nil would inherit ours.
	command.Env, command.Stdout, command.Stderr = append([]string{}, environment...), &out, &errs
	err := command.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return command.ProcessState.ExitCode(), out.String(), errs.String()
}

type wrongSetting struct {
	environment string // in addition to valid URLs
	args        string
	names       string // must be in the error line
}

// wrongSettings also contains those that the tests of features add.
var wrongSettings = map[string]wrongSetting{
	"no command":              {"", "", "expected one of"},
	"unknown command":         {"", "serve", "serve"},
	"unknown flag":            {"", "api --port=1", "--port"},
	"log level":               {"LOG_LEVEL=loud", "all", "--log-level"},
	"log format":              {"LOG_FORMAT=xml", "all", "--log-format"},
	"listen address":          {"LISTEN=nowhere", "api", "--listen"},
	"listen port":             {"LISTEN=127.0.0.1:70000", "api", "--listen"},
	"postgres url":            {"POSTGRES_URL=postgres://u:hunter2@h:port/d", "api", "--postgres-url"},
	"postgres url of migrate": {"POSTGRES_URL=postgres://u:hunter2@h:port/d", "migrate", "--postgres-url"},
	"listen url":              {"POSTGRES_LISTEN_URL=mysql://u:hunter2@h", "api", "--postgres-listen-url"},
	"amqp url":                {"AMQP_URL=http://u:hunter2@h", "relay", "--amqp-url"},
	"too few connections":     {"POSTGRES_MAX_CONNS=1", "api", "--max-conns"},
	"connections not number":  {"POSTGRES_MAX_CONNS=many", "api", "--max-conns"},
	"page rows":               {"RELAY_PAGE_ROWS=0", "relay", "--page-rows"},
	"lease":                   {"RELAY_LEASE=1ms", "relay", "--lease"},
	"lease not duration":      {"RELAY_LEASE=5", "relay", "--lease"},
	"poll interval":           {"RELAY_POLL_INTERVAL=1h", "all", "--poll-interval"},
	"prefetch":                {"CONSUMER_PREFETCH=0", "consumer", "--prefetch"},
	"batch":                   {"CONSUMER_BATCH=9999", "consumer", "--batch"},
	"exchange":                {"EXCHANGE=amq.fanout", "relay", "--exchange"},
	"topology":                {"TOPOLOGY=maybe", "relay", "--topology"},
	"exchange of topology":    {"", "topology --exchange=amq.fanout", "--exchange"},
	"declare nowhere":         {"AMQP_URL=", "topology --declare", "--amqp-url"},
	"shards":                  {"OUTBOX_SHARDS=65", "migrate", "--shards"},
	"wait of migrate":         {"MIGRATE_WAIT=25h", "migrate", "--wait"},
	"no command of outbox":    {"", "outbox", "expected one of"},
	"replay since":            {"", "outbox replay --since=yesterday", "--since"},
	"replay until":            {"", "outbox replay --until=-1h", "--until"},
	"replay backwards":        {"", "outbox replay --since=1h --until=2h", "--until"},
	"replay id":               {"", "outbox replay --id=seven", "--id"},
	"replay rate":             {"", "outbox replay --rate=0", "--rate"},
	"replay after":            {"", "outbox replay --after=7", "--after"},
	"replay group":            {"", "outbox replay --group=nobody", "--group"},
	"no shards":               {"", "outbox shards 0", "shards"},
	"shards not number":       {"", "outbox shards many", "<n>"},
	"shards timeout":          {"", "outbox shards 2 --timeout=0s", "--timeout"},
	"letter":                  {"", "dead show one", "<id>"},
	"letters limit":           {"", "dead list --limit=0", "--limit"},
	"letters cause":           {"", "dead list --cause=bad", "--cause"},
	"letters since":           {"", "dead list --since=2026-13-01", "--since"},
	"redrive without reason":  {"", "dead redrive --id=1", "--reason"},
	"redrive of everything":   {"", "dead redrive --reason=x", "--all"},
	"redrive of all and some": {"", "dead redrive --reason=x --all --key=k", "--all"},
	"redrive rate":            {"", "dead redrive --reason=x --all --rate=0", "--rate"},
	"redrive rate of nothing": {"", "dead redrive --reason=x --all --rate=NaN", "--rate"},
	"replay rate of nothing":  {"", "outbox replay --rate=NaN", "--rate"},
	"discard without reason":  {"", "dead discard --id=1", "--reason"},
	"discard of everything":   {"", "dead discard --reason=x", "--all"},
	"discard by force":        {"", "dead discard --reason=x --id=1 --force", "--force"},
	"trace of nothing":        {"", "trace", "<message-id>"},
	"doctor's exchange":       {"EXCHANGE=amq.fanout", "doctor", "--exchange"},
	"doctor's listen url":     {"POSTGRES_LISTEN_URL=mysql://u:hunter2@h", "doctor", "--postgres-listen-url"},
	"doctor's management url": {"RABBITMQ_MANAGEMENT_URL=ftp://u:hunter2@h", "doctor", "--management-url"},
	"no credentials":          {"API_KEYS=", "api", "--insecure-no-auth"},
	"pause without reason":    {"", "consumer pause g --reason=", "--reason"},
	"none for all":            {"API_KEYS=", "all", "--insecure-no-auth"},
	"keys and no auth":        {"INSECURE_NO_AUTH=true", "api", "--insecure-no-auth"},
	"half of the tokens":      {"JWT_ISSUER=https://issuer.example", "api", "--jwks"},
	"keys twice":              {"API_KEYS_FILE=keys", "api", "--api-keys"},
	"certificate without key": {"TLS_CERT=cert.pem", "all", "--tls-key"},
	"client CA without TLS":   {"TLS_CLIENT_CA=ca.pem", "api", "--tls-client-ca"},
	"client CA missing":       {"TLS_CLIENT_REQUIRED=true", "api", "--tls-client-required"},
	"caller rate":             {"CALLER_RATE=NaN", "api", "--caller-rate"},
	"caller burst":            {"CALLER_BURST=0", "api", "--caller-burst"},
	"caller concurrency":      {"CALLER_CONCURRENCY=-1", "api", "--caller-concurrency"},
	"message size":            {"READ_MAX_BYTES=1", "api", "--read-max-bytes"},
	"http connections":        {"HTTP_MAX_CONNS=0", "api", "--http-max-conns"},
	"bytes in flight":         {"IN_FLIGHT_MAX_BYTES=-1", "api", "--in-flight-max-bytes"},
	"connections per address": {"HTTP_MAX_CONNS_PER_ADDRESS=-2", "api", "--http-max-conns-per-address"},
	"operators' address":      {"OPS_LISTEN=nowhere", "relay", "--ops-listen"},
	"any origin":              {"CORS_ORIGINS=*", "api", "--cors-origins"},
	"origin with a path":      {"CORS_ORIGINS=https://a.example/b", "api", "--cors-origins"},
	"rpc call":                {"", "rpc call orders.v1.OrderService", "SERVICE/METHOD"},
	"health check timeout":    {"", "healthcheck --timeout=soon", "--timeout"},
}

func TestWrongSettingsAreNamedInOneLine(t *testing.T) {
	t.Parallel()
	for name, test := range wrongSettings {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			environment := []string{goodPostgres, goodAMQP, "API_KEYS=" + goodKeys}
			if test.environment != "" {
				environment = append(environment, test.environment) // overrides the others
			}
			status, stdout, stderr := call(t, environment, strings.Fields(test.args)...)
			if status != 2 || stdout != "" {
				t.Errorf("exit status %d, output %q", status, stdout)
			}
			if strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, test.names) {
				t.Errorf("not one line that names %s: %q", test.names, stderr)
			}
			if strings.Contains(stderr, "hunter2") {
				t.Errorf("a password is printed: %q", stderr)
			}
		})
	}
}

func TestMissingURLsAreNamed(t *testing.T) {
	t.Parallel()
	for command, missing := range map[string][]string{
		"api": {"--postgres-url"}, "migrate": {"--postgres-url"}, "relay": {"--postgres-url", "--amqp-url"},
		"consumer": {"--postgres-url", "--amqp-url"}, "all": {"--postgres-url", "--amqp-url"},
	} {
		status, _, stderr := call(t, nil, command)
		if status != 2 || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: exit status %d, %q", command, status, stderr)
		}
		for _, name := range missing {
			if !strings.Contains(stderr, name) {
				t.Errorf("%s: %s is not named: %q", command, name, stderr)
			}
		}
	}
}

// secretURLs are the settings that take a URL, each with a secret in every part that can contain one. Their ports are
// closed.
var secretURLs = map[string]string{
	"POSTGRES_URL":            "postgres://u:hunter2@127.0.0.1:1/d?options=-chunter2",
	"POSTGRES_LISTEN_URL":     "postgres://u:hunter2@127.0.0.1:1/d?options=-chunter2",
	"AMQP_URL":                "amqp://u:hunter2@127.0.0.1:1/?token=hunter2",
	"RABBITMQ_MANAGEMENT_URL": "http://u:hunter2@127.0.0.1:1/?token=hunter2#hunter2",
	"JWT_JWKS":                "https://hunter2:hunter2@127.0.0.1:1/keys?token=hunter2#hunter2",
}

// secretEnvironment contains secretURLs and the other settings of the processes, such as OpenTelemetry's.
func secretEnvironment() []string {
	all := []string{
		"JWT_ISSUER=i", "JWT_AUDIENCE=a", "LOG_LEVEL=debug", "AMQP_USERS_PASSWORD=hunter2",
		"OTEL_BSP_SCHEDULE_DELAY=10",
		"OTEL_EXPORTER_OTLP_ENDPOINT=http://hunter2:hunter2@127.0.0.1:1/?token=hunter2",
		"OTEL_EXPORTER_OTLP_HEADERS=authorization=hunter2",
	}
	for name, value := range secretURLs {
		all = append(all, name+"="+value)
	}
	return all
}

// failing are commands that fail with secretEnvironment.
var failing = []string{
	"doctor", "doctor --json", "migrate", "topology --declare", "topology --declare --users=x", "outbox status",
	"outbox replay --since=1h", "dead list", "consumer ls",
	"rpc call --http=http://u:hunter2@127.0.0.1:1/?hunter2 a.B/C",
	"healthcheck http://u:hunter2@127.0.0.1:1/?hunter2",
	"relay --amqp-url=http://u:hunter2@h?hunter2", "api --jwks=ftp://u:hunter2@h?hunter2",
}

// No process and no command writes the secrets of a URL to its log or its output, whichever step fails.
func TestNothingShowsTheSecretsOfURLs(t *testing.T) {
	t.Parallel()
	for _, s := range settingsOf(newParser(new(cli)).Model) {
		if isOfDomain(s) {
			continue // the program under test does not have it
		}
		if name := s.flags[0].Envs[0]; secretURLs[name] == "" && strings.Contains(name+s.flags[0].Help, "URL") {
			t.Errorf("%s takes a URL: add it to secretURLs", name)
		}
	}
	for _, name := range processes() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t, name, secretEnvironment()...)
			p.checkLog = func(log string) {
				if strings.Contains(log, "hunter2") {
					t.Errorf("%s logs a secret:\n%s", name, log)
				}
				if name == "api" && !strings.Contains(log, "127.0.0.1:1/keys?…") {
					t.Errorf("%s does not log which keys it cannot fetch:\n%s", name, log)
				}
			}
			p.await(t, "database")
		})
	}
	for _, command := range failing {
		status, stdout, stderr := call(t, secretEnvironment(), strings.Fields(command)...)
		if status == 0 || strings.Contains(stdout+stderr, "hunter2") {
			t.Errorf("%s: exit status %d, %s%s", command, status, stdout, stderr)
		}
	}
}

func TestFailuresGiveOneLine(t *testing.T) {
	t.Parallel()
	for command, environment := range map[string]string{
		"migrate":                               goodPostgres,
		"healthcheck http://127.0.0.1:1/readyz": "",
	} {
		status, _, stderr := call(t, []string{environment}, strings.Fields(command)...)
		if status != 1 || strings.Count(stderr, "\n") != 1 || strings.Contains(stderr, "hunter2") {
			t.Errorf("%s: exit status %d, %q", command, status, stderr)
		}
	}
}

// A process that cannot use a file or address names it in one line and ends.
func TestUnusableFilesAreNamedInOneLine(t *testing.T) {
	t.Parallel()
	for environment, names := range map[string]string{
		"API_KEYS_FILE=/does/not/exist":                           "/does/not/exist",
		"API_KEYS=ann.hunter2":                                    "API key on line 1",
		"JWT_JWKS=http://h.example/ JWT_ISSUER=i JWT_AUDIENCE=a":  "JWKS",
		"TLS_CERT=/does/not/exist TLS_KEY=x API_KEYS=" + goodKeys: "/does/not/exist",
	} {
		status, _, stderr := call(t, append([]string{goodPostgres}, strings.Fields(environment)...), "api")
		oneLine := strings.Count(stderr, "\n") == 1
		if status != 1 || !oneLine || !strings.Contains(stderr, names) || strings.Contains(stderr, "hunter2") {
			t.Errorf("%s: exit status %d, %q", environment, status, stderr)
		}
	}
}

func TestAPIKeyIsShownOnceAndKeptAsAHash(t *testing.T) {
	t.Parallel()
	status, stdout, _ := call(t, nil, "apikey", "new", "ann", "customer", "operator")
	want := regexp.MustCompile(`^key:  ann\.[A-Z2-7]{26} .*\nline: ann:customer,operator:[0-9a-f]{64} .*\n$`)
	if status != 0 || !want.MatchString(stdout) {
		t.Errorf("exit status %d, output %q", status, stdout)
	}
	status, _, stderr := call(t, nil, "apikey", "new", "a:b", "customer")
	if status != 1 || strings.Count(stderr, "\n") != 1 {
		t.Errorf("exit status %d, %q", status, stderr)
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	status, stdout, _ := call(t, nil, "version")
	if status != 0 || !strings.HasPrefix(stdout, app.ServiceName+" ") {
		t.Errorf("exit status %d, output %q", status, stdout)
	}
}
