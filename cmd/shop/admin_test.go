package main

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"

	"example.com/shop/internal/app"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/ops"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
)

// fixture is a database, a broker, and the program as an operator runs it: as shop_operator.
type fixture struct {
	*pgxpool.Pool
	t            *testing.T
	environment  []string
	amqpURL      string
	group, other ops.Group // those of internal/app/probes.go
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	t.Parallel()
	f := &fixture{Pool: testenv.Postgres(t), t: t, amqpURL: testenv.AMQP(t)}
	url := f.Config().ConnString()
	f.environment = []string{
		"POSTGRES_URL=" + testenv.As(t, url, "shop_operator"), "POSTGRES_LISTEN_URL=" + url, "AMQP_URL=" + f.amqpURL,
		"USER=ann", "TZ=UTC",
	}
	f.group = ops.Group{Name: "probes", Types: []string{"google.protobuf.StringValue"}}
	f.other = ops.Group{Name: "others"}
	return f
}

func (f *fixture) exec(sql string, args ...any) {
	f.t.Helper()
	if _, err := f.Exec(f.t.Context(), sql, args...); err != nil {
		f.t.Fatalf("%s: %v", sql, err)
	}
}

// wantRows checks the rows of a query, joined into one text.
func (f *fixture) wantRows(want, sql string, args ...any) {
	f.t.Helper()
	rows, err := f.Query(f.t.Context(), sql, args...)
	if err != nil {
		f.t.Fatal(err)
	}
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if joined := strings.Join(got, ", "); err != nil || joined != want {
		f.t.Errorf("%s: got %q, %v, want %q", sql, joined, err, want)
	}
}

// run runs a command, and checks its exit status and that an error is one line without a password.
func (f *fixture) run(status int, args ...string) (stdout, stderr string) {
	f.t.Helper()
	got, stdout, stderr := call(f.t, f.environment, args...)
	lines := strings.Count(stderr, "\n")
	wantLines := 0
	if status != 0 {
		wantLines = 1
	}
	if got != status || lines != wantLines || strings.Contains(stdout+stderr, "hunter2") {
		f.t.Errorf("shop %v: exit status %d, want %d\n%s%s", args, got, status, stdout, stderr)
	}
	return stdout, stderr
}

// wantOutput runs a command and checks that its output matches each pattern.
func (f *fixture) wantOutput(status int, args string, patterns ...string) {
	f.t.Helper()
	stdout, stderr := f.run(status, strings.Fields(args)...)
	for _, pattern := range patterns {
		if !regexp.MustCompile(pattern).MatchString(stdout + stderr) {
			f.t.Errorf("shop %s: no match for %s in\n%s%s", args, pattern, stdout, stderr)
		}
	}
}

// runJSON runs a command with --json and decodes the last line of its output.
func (f *fixture) runJSON(status int, args string, into any) {
	f.t.Helper()
	stdout, _ := f.run(status, append(strings.Fields(args), "--json")...)
	lines := strings.Split(strings.TrimSpace(stdout), "\n")
	decoder := json.NewDecoder(strings.NewReader(lines[len(lines)-1]))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		f.t.Errorf("shop %s: %v in\n%s", args, err, stdout)
	}
}

// insertMessages inserts n messages for the first group into the outbox, and returns their IDs.
func (f *fixture) insertMessages(n int) (ids []string) {
	f.t.Helper()
	for range n {
		id := uuid.Must(uuid.NewV7()).String()
		f.exec(`SELECT outbox_insert($1::text, 'k', '\x00ff'::bytea, '{}'::jsonb, $2::uuid)`, f.group.Types[0], id)
		ids = append(ids, id)
	}
	return ids
}

// markDelivered records every message of the outbox as published.
func (f *fixture) markDelivered() {
	f.exec(`UPDATE outbox_cursor SET delivered = pg_current_snapshot()`)
}

func (f *fixture) addLetter(consumer, messageID, reason string) {
	f.t.Helper()
	f.exec(`INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
		VALUES ($1, $2, $3, 'k', decode(repeat('c0ffee', 100), 'hex'), '{"tenant": "a"}', $4, E'it is\x1b[31m broken', 3)`,
		consumer, messageID, f.group.Types[0], reason)
}

// withChannel runs fn with a channel to the broker.
func (f *fixture) withChannel(fn func(channel *amqp.Channel) error) {
	f.t.Helper()
	conn, err := amqp.Dial(f.amqpURL)
	if err != nil {
		f.t.Fatal(err)
	}
	defer conn.Close()
	channel, err := conn.Channel()
	if err == nil {
		err = fn(channel)
	}
	if err != nil {
		f.t.Fatal(err)
	}
}

// queueDepth returns how many messages a queue has, 0 if it does not exist.
func (f *fixture) queueDepth(queue string) (n int) {
	f.t.Helper()
	f.withChannel(func(channel *amqp.Channel) error {
		if found, err := channel.QueueDeclarePassive(queue, true, false, false, false, nil); err == nil {
			n = found.Messages
		}
		return nil
	})
	return n
}

// takeAll empties the queue of a group, and returns the exchange and ID of each message.
func (f *fixture) takeAll(group string) (taken []string) {
	f.t.Helper()
	queue := app.ServiceName + "." + group
	n := f.queueDepth(queue)
	f.withChannel(func(channel *amqp.Channel) error {
		deliveries, err := channel.ConsumeWithContext(f.t.Context(), queue, "", true, false, false, false, nil)
		for len(taken) < n && err == nil {
			delivery := <-deliveries
			taken = append(taken, delivery.Exchange+" "+delivery.MessageId)
		}
		return err
	})
	return taken
}

func newID() string { return uuid.Must(uuid.NewV7()).String() }

func TestUnreachableServersGiveOneLine(t *testing.T) {
	f := newFixture(t)
	good := f.environment
	f.environment = []string{goodPostgres, goodAMQP, "USER=ann"} // closed ports
	for _, args := range []string{
		"outbox status", "outbox repair", "outbox shards", "outbox shards 2", "outbox replay --dry-run",
		"outbox replay", "dead list", "dead show 1", "dead redrive --id=1 --reason=x",
		"dead discard --id=1 --reason=x", "trace x", "doctor",
	} {
		f.wantOutput(1, args, `refused`)
	}
	f.environment = append(good, goodAMQP)
	f.wantOutput(1, "outbox replay", `^shop: connect to rabbitmq: .*refused`)
}

func TestActorName(t *testing.T) {
	t.Setenv("USER", "ann")
	if got := actorName(" "); got != "ann" {
		t.Errorf("got %q", got)
	}
	if got := actorName("bob"); got != "bob" {
		t.Errorf("got %q", got)
	}
	unknown := resolveFlags{letterFilter: letterFilter{ID: []int64{1}}, Reason: "x", Rate: 1}
	if err := unknown.checkAs(""); err == nil || !strings.Contains(err.Error(), "--actor") {
		t.Errorf("error without an actor is %v", err)
	}
}
