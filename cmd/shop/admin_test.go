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

// office is a database and a broker of a test's own, and the program as an operator calls it: with the rights of shop_operator.
type office struct {
	*pgxpool.Pool
	t            *testing.T
	environment  []string
	amqpURL      string
	group, other ops.Group // those of internal/app/probes.go
}

func newOffice(t *testing.T) *office {
	t.Helper()
	t.Parallel()
	o := &office{Pool: testenv.Postgres(t), t: t, amqpURL: testenv.AMQP(t)}
	url := o.Config().ConnString()
	o.environment = []string{
		"POSTGRES_URL=" + testenv.As(t, url, "shop_operator"), "POSTGRES_LISTEN_URL=" + url, "AMQP_URL=" + o.amqpURL, "USER=ann", "TZ=UTC",
	}
	o.group, o.other = ops.Group{Name: "probes", Types: []string{"google.protobuf.StringValue"}}, ops.Group{Name: "others"}
	return o
}

func (o *office) exec(sql string, args ...any) {
	o.t.Helper()
	if _, err := o.Exec(o.t.Context(), sql, args...); err != nil {
		o.t.Fatalf("%s: %v", sql, err)
	}
}

// want checks what a query finds, as one text.
func (o *office) want(want, sql string, args ...any) {
	o.t.Helper()
	rows, err := o.Query(o.t.Context(), sql, args...)
	if err != nil {
		o.t.Fatal(err)
	}
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if joined := strings.Join(got, ", "); err != nil || joined != want {
		o.t.Errorf("%s: got %q, %v, want %q", sql, joined, err, want)
	}
}

// run runs a command, checks its exit status, and that an error is one line without a password.
func (o *office) run(status int, args ...string) (stdout, stderr string) {
	o.t.Helper()
	got, stdout, stderr := call(o.t, o.environment, args...)
	lines := strings.Count(stderr, "\n")
	if got != status || status == 0 && lines != 0 || status != 0 && lines != 1 || strings.Contains(stdout+stderr, "hunter2") {
		o.t.Errorf("shop %v: exit status %d, want %d\n%s%s", args, got, status, stdout, stderr)
	}
	return stdout, stderr
}

// says runs a command and checks that its output matches each expression.
func (o *office) says(status int, args string, expressions ...string) {
	o.t.Helper()
	stdout, stderr := o.run(status, strings.Fields(args)...)
	for _, one := range expressions {
		if !regexp.MustCompile(one).MatchString(stdout + stderr) {
			o.t.Errorf("shop %s: no %s in\n%s%s", args, one, stdout, stderr)
		}
	}
}

// json runs a command with --json and decodes its last line.
func (o *office) json(status int, args string, into any) {
	o.t.Helper()
	stdout, _ := o.run(status, append(strings.Fields(args), "--json")...)
	lines := strings.Split(strings.TrimSpace(stdout), "\n")
	decoder := json.NewDecoder(strings.NewReader(lines[len(lines)-1]))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		o.t.Errorf("shop %s: %v in\n%s", args, err, stdout)
	}
}

// insert puts n messages of the first group into the log, and returns their IDs.
func (o *office) insert(n int) (ids []string) {
	o.t.Helper()
	for range n {
		id := uuid.Must(uuid.NewV7()).String()
		o.exec(`SELECT outbox_insert($1::text, 'k', '\x00ff'::bytea, '{}'::jsonb, $2::uuid)`, o.group.Types[0], id)
		ids = append(ids, id)
	}
	return ids
}

// delivered records all that is in the log as published.
func (o *office) delivered() { o.exec(`UPDATE outbox_cursor SET delivered = pg_current_snapshot()`) }

func (o *office) letter(consumer, messageID, reason string) {
	o.t.Helper()
	o.exec(`INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
		VALUES ($1, $2, $3, 'k', decode(repeat('c0ffee', 100), 'hex'), '{"tenant": "a"}', $4, E'it is\x1b[31m broken', 3)`, consumer, messageID, o.group.Types[0], reason)
}

// channel runs fn with a channel to the broker.
func (o *office) channel(fn func(channel *amqp.Channel) error) {
	o.t.Helper()
	conn, err := amqp.Dial(o.amqpURL)
	if err != nil {
		o.t.Fatal(err)
	}
	defer conn.Close()
	channel, err := conn.Channel()
	if err == nil {
		err = fn(channel)
	}
	if err != nil {
		o.t.Fatal(err)
	}
}

// ready asks how many messages are in a queue, 0 if there is none.
func (o *office) ready(queue string) (n int) {
	o.t.Helper()
	o.channel(func(channel *amqp.Channel) error {
		if found, err := channel.QueueDeclarePassive(queue, true, false, false, false, nil); err == nil {
			n = found.Messages
		}
		return nil
	})
	return n
}

// take takes from the service's queue of a group all that is there: each message's exchange and ID.
func (o *office) take(group string) (taken []string) {
	o.t.Helper()
	queue := app.ServiceName + "." + group
	n := o.ready(queue)
	o.channel(func(channel *amqp.Channel) error {
		deliveries, err := channel.ConsumeWithContext(o.t.Context(), queue, "", true, false, false, false, nil)
		for len(taken) < n && err == nil {
			one := <-deliveries
			taken = append(taken, one.Exchange+" "+one.MessageId)
		}
		return err
	})
	return taken
}

func newID() string { return uuid.Must(uuid.NewV7()).String() }

func TestServersAwayIsOneLine(t *testing.T) {
	o := newOffice(t)
	good := o.environment
	o.environment = []string{goodPostgres, goodAMQP, "USER=ann"} // where nobody listens
	for _, args := range []string{
		"outbox status", "outbox repair", "outbox shards", "outbox shards 2", "outbox replay --dry-run", "dead list", "dead show 1", "dead redrive --id=1 --reason=x",
		"dead discard --id=1 --reason=x", "trace x", "doctor", "outbox replay",
	} {
		o.says(1, args, `refused`)
	}
	o.environment = append(good, goodAMQP)
	o.says(1, "outbox replay", `^shop: connect to rabbitmq: .*refused`)
}

func TestWhoWorksHere(t *testing.T) {
	t.Setenv("USER", "ann")
	if got := person(" "); got != "ann" {
		t.Errorf("got %q", got)
	}
	if got := person("bob"); got != "bob" {
		t.Errorf("got %q", got)
	}
	unknown := resolveFlags{letterFilter: letterFilter{ID: []int64{1}}, Reason: "x", Rate: 1}
	if err := unknown.checkAs(""); err == nil || !strings.Contains(err.Error(), "--actor") {
		t.Errorf("nobody may resolve letters: %v", err)
	}
}
