package inbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestMain(m *testing.M) {
	slog.SetDefault(slog.New(slog.DiscardHandler)) // thousands of messages fail in these tests
	testenv.Main(m)
}

var days = ring{slotLength}

// act is run by the handler after it has written its effect.
type act func(ctx context.Context, tx pgx.Tx) error

var errProbe = errors.New("probe failed")

// fails is an act that only fails.
func fails(context.Context, pgx.Tx) error { return errProbe }

// bundle is a database with a table of effects, and a group whose handler writes to it. If the handler is committed
// twice for a text, n is 2.
type bundle struct {
	db    *pgxpool.Pool
	group *Group

	mu   sync.Mutex
	acts map[string]act // by the text of the message
	runs map[string]int // how often the handler ran, committed or not
}

func setup(t testing.TB) *bundle {
	t.Helper()
	return setupOn(t, testenv.Postgres(t))
}

func setupOn(t testing.TB, db *pgxpool.Pool) *bundle {
	t.Helper()
	exec(t, db, `
		CREATE TABLE effects (
			consumer text, name text, n integer NOT NULL, seq bigint GENERATED ALWAYS AS IDENTITY,
			PRIMARY KEY (consumer, name))`)
	return newBundle(db, "group")
}

func exec(t testing.TB, db *pgxpool.Pool, sql string, args ...any) {
	t.Helper()
	if _, err := db.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// newBundle makes another group on the same database, for tests with many cases. It does not see the other groups.
func newBundle(db *pgxpool.Pool, name string) *bundle {
	b := &bundle{db: db, group: NewGroup(name), acts: map[string]act{}, runs: map[string]int{}}
	Handle(b.group, func(ctx context.Context, tx pgx.Tx, message *wrapperspb.StringValue) error {
		text := message.GetValue()
		b.mu.Lock()
		b.runs[text]++
		do := b.acts[text]
		b.mu.Unlock()
		_, err := tx.Exec(ctx, effectSQL, name, text)
		if err != nil || do == nil {
			return err
		}
		return do(ctx, tx)
	})
	return b
}

const effectSQL = `
INSERT INTO effects (consumer, name, n) VALUES ($1, $2, 1)
ON CONFLICT (consumer, name) DO UPDATE SET n = effects.n + 1`

const listEffectsSQL = `
SELECT CASE n WHEN 1 THEN name ELSE format('%s x%s', name, n) END FROM effects WHERE consumer = $1 ORDER BY seq`

// on sets the act for a text; nil means none.
func (b *bundle) on(text string, do act) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.acts[text] = do
}

func (b *bundle) ran(text string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.runs[text]
}

// eager is a Config whose retries are due at once.
var eager = Config{MaxAttempts: 3, RetryBase: time.Nanosecond}

func (b *bundle) inbox(config Config) *Inbox { return New(b.db, b.group, config) }

func probe(key, text string) messaging.Delivery {
	m := messaging.New(key, wrapperspb.String(text))
	return messaging.Delivery{
		ID: m.ID.String(), Type: m.Type, Key: key, Payload: m.Payload, Headers: map[string]string{"probe": text},
	}
}

// probes returns deliveries without a key, with the texts m000, m001 and so on.
func probes(n int) (deliveries []messaging.Delivery, texts []string) {
	for i := range n {
		texts = append(texts, fmt.Sprintf("m%03d", i))
		deliveries = append(deliveries, probe("", texts[i]))
	}
	return deliveries, texts
}

// tester is the interface that testing.T and rapid.T share.
type tester interface {
	Helper()
	Context() context.Context
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

func process(t tester, p *Inbox, deliveries ...messaging.Delivery) {
	t.Helper()
	if err := p.Process(t.Context(), deliveries); err != nil {
		t.Fatalf("process: %v", err)
	}
}

// retryAll retries until nothing is due, and returns how many messages it retried.
func retryAll(t tester, p *Inbox) (n int) {
	t.Helper()
	for ; retryOne(t, p); n++ {
	}
	return n
}

func retryOne(t tester, p *Inbox) bool {
	t.Helper()
	found, err := p.RetryNext(t.Context())
	if err != nil {
		t.Fatalf("retry: %v", err)
	}
	return found
}

func (b *bundle) exec(t tester, sql string, args ...any) {
	t.Helper()
	if _, err := b.db.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// list returns the rows of a query with one column of text and the group's name as $1.
func (b *bundle) list(t tester, sql string) []string {
	t.Helper()
	rows, err := b.db.Query(t.Context(), sql, b.group.name)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	found, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return found
}

// wantEffects checks that exactly these effects exist, once each and in this order.
func (b *bundle) wantEffects(t tester, want ...string) {
	t.Helper()
	got := b.list(t, listEffectsSQL)
	if !slices.Equal(got, want) {
		t.Errorf("effects are %q, want %q", got, want)
	}
}

// wantWaiting checks the rows of inbox_retry, as "text attempts/starts" in the order of arrival. Starts are the
// attempts plus the runs whose outcome is unknown. It also checks the heads: without a head, a key would wait forever.
func (b *bundle) wantWaiting(t tester, want ...string) {
	t.Helper()
	got := b.list(t, `
		SELECT format('%s %s/%s', headers ->> 'probe', attempts, attempts + cardinality(runs))
		FROM inbox_retry WHERE consumer = $1 ORDER BY seq`)
	if !slices.Equal(got, want) {
		t.Errorf("waiting messages are %q, want %q", got, want)
	}
	b.wantHeads(t)
}

// wantHeads checks that the first waiting message of each key is a head, and that no other message is.
func (b *bundle) wantHeads(t tester) {
	t.Helper()
	wrong := b.list(t, `
		SELECT format('%s of key %s', headers ->> 'probe', key)
		FROM (
			SELECT *, min(seq) OVER (PARTITION BY key) AS first FROM inbox_retry
			WHERE consumer = $1 AND key <> '') AS message
		WHERE (due_at IS NULL) = (seq = first)`)
	if len(wrong) > 0 {
		t.Errorf("the heads of the keys are wrong: %q", wrong)
	}
}

// wantDead checks the dead letters, as "reason attempts" in the order in which they were stored.
func (b *bundle) wantDead(t tester, want ...string) {
	t.Helper()
	got := b.list(t, `SELECT format('%s %s', reason, attempts) FROM dead_letter WHERE consumer = $1 ORDER BY id`)
	if !slices.Equal(got, want) {
		t.Errorf("dead letters are %q, want %q: %q", got, want, b.errorTexts(t))
	}
}

// errorTexts returns the error texts of the dead letters.
func (b *bundle) errorTexts(t tester) []string {
	t.Helper()
	return b.list(t, `SELECT error FROM dead_letter WHERE consumer = $1 ORDER BY id`)
}

// wantKept checks that the only dead letter contains the delivery's payload, byte for byte.
func (b *bundle) wantKept(t tester, reason deadletter.Reason, payload []byte) {
	t.Helper()
	var gotReason deadletter.Reason
	var gotPayload []byte
	const sql = `SELECT reason, payload FROM dead_letter WHERE consumer = $1`
	if err := b.db.QueryRow(t.Context(), sql, b.group.name).Scan(&gotReason, &gotPayload); err != nil {
		t.Fatalf("read dead letter: %v", err)
	}
	if gotReason != reason || string(gotPayload) != string(payload) {
		t.Errorf("dead letter is %s with %q, want %s with %q", gotReason, gotPayload, reason, payload)
	}
}

// wantCopies checks how many copies of a message the inbox has counted.
func (b *bundle) wantCopies(t tester, d messaging.Delivery, want int) {
	t.Helper()
	id, err := days.identify(d.ID, time.Now())
	if err != nil {
		t.Fatalf("identify: %v", err)
	}
	var got int
	const sql = `SELECT copies FROM inbox WHERE slot = $1 AND consumer = $2 AND message_id = $3`
	err = b.db.QueryRow(t.Context(), sql, id.slot, b.group.name, id.id).Scan(&got)
	if err != nil || got != want {
		t.Errorf("%s has counted %d copies, %v, want %d", b.group.name, got, err, want)
	}
}

// wantAway checks that an error says that the database is unavailable and that nothing was written.
func wantAway(t tester, err error) {
	t.Helper()
	if !errors.Is(err, postgres.ErrUnavailable) {
		t.Errorf("got error %v, want one that wraps ErrUnavailable", err)
	}
}
