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
	slog.SetDefault(slog.New(slog.DiscardHandler)) // the tests make thousands of messages fail
	testenv.Main(m)
}

var days = ring{slotLength}

// act is what the handler does after it has written its effect.
type act func(ctx context.Context, tx pgx.Tx) error

var errProbe = errors.New("probe failed")

// fails is an act that does nothing else.
func fails(context.Context, pgx.Tx) error { return errProbe }

// bundle is a database with a table of effects, and a group whose handler writes to it. A second run of the handler for one
// text would show as n = 2.
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
			consumer text, name text, n integer NOT NULL, seq bigint GENERATED ALWAYS AS IDENTITY, PRIMARY KEY (consumer, name))`)
	return newBundle(db, "group")
}

func exec(t testing.TB, db *pgxpool.Pool, sql string, args ...any) {
	t.Helper()
	if _, err := db.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// newBundle makes one more group on the same database, for tests of many cases. It sees nothing of the others.
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

const effectSQL = `INSERT INTO effects (consumer, name, n) VALUES ($1, $2, 1) ON CONFLICT (consumer, name) DO UPDATE SET n = effects.n + 1`

// on sets what the handler does with a text; nil means nothing more.
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
	return messaging.Delivery{ID: m.ID.String(), Type: m.Type, Key: key, Payload: m.Payload, Headers: map[string]string{"probe": text}}
}

// probes makes deliveries without a key, with the texts m000, m001 ...
func probes(n int) (deliveries []messaging.Delivery, texts []string) {
	for i := range n {
		texts = append(texts, fmt.Sprintf("m%03d", i))
		deliveries = append(deliveries, probe("", texts[i]))
	}
	return deliveries, texts
}

// tester is what testing.T and rapid.T share.
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

// retryAll retries until nothing is due, and returns how many there were.
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

// wantEffects checks that these effects are there, once each, in this order, and no others.
func (b *bundle) wantEffects(t tester, want ...string) {
	t.Helper()
	got := b.list(t, `SELECT CASE n WHEN 1 THEN name ELSE format('%s x%s', name, n) END FROM effects WHERE consumer = $1 ORDER BY seq`)
	if !slices.Equal(got, want) {
		t.Errorf("effects are %q, want %q", got, want)
	}
}

// wantWaiting checks what stands in inbox_retry, as "text attempts/starts" in the order of arrival. A start is an
// attempt, or a run of which nothing is known. It also checks that each key has one head, its first message: else the
// others would wait without end.
func (b *bundle) wantWaiting(t tester, want ...string) {
	t.Helper()
	got := b.list(t, `
		SELECT format('%s %s/%s', headers ->> 'probe', attempts, attempts + cardinality(runs))
		FROM inbox_retry WHERE consumer = $1 ORDER BY seq`)
	if !slices.Equal(got, want) {
		t.Errorf("waiting are %q, want %q", got, want)
	}
	b.wantHeads(t)
}

// wantHeads checks that the first message of each key that waits is its head, and no other.
func (b *bundle) wantHeads(t tester) {
	t.Helper()
	wrong := b.list(t, `
		SELECT format('%s of key %s', headers ->> 'probe', key)
		FROM (SELECT *, min(seq) OVER (PARTITION BY key) AS first FROM inbox_retry WHERE consumer = $1 AND key <> '') AS one
		WHERE (due_at IS NULL) = (seq = first)`)
	if len(wrong) > 0 {
		t.Errorf("the heads of the keys are wrong: %q", wrong)
	}
}

// wantDead checks the dead letters, as "reason attempts" in the order of their death.
func (b *bundle) wantDead(t tester, want ...string) {
	t.Helper()
	got := b.list(t, `SELECT format('%s %s', reason, attempts) FROM dead_letter WHERE consumer = $1 ORDER BY id`)
	if !slices.Equal(got, want) {
		t.Errorf("dead letters are %q, want %q: %q", got, want, b.errorTexts(t))
	}
}

// errorTexts returns what the dead letters say.
func (b *bundle) errorTexts(t tester) []string {
	t.Helper()
	return b.list(t, `SELECT error FROM dead_letter WHERE consumer = $1 ORDER BY id`)
}

// wantKept checks that the only dead letter holds a delivery's payload byte for byte.
func (b *bundle) wantKept(t tester, reason deadletter.Reason, payload []byte) {
	t.Helper()
	var gotReason deadletter.Reason
	var gotPayload []byte
	if err := b.db.QueryRow(t.Context(), `SELECT reason, payload FROM dead_letter WHERE consumer = $1`, b.group.name).Scan(&gotReason, &gotPayload); err != nil {
		t.Fatalf("read dead letter: %v", err)
	}
	if gotReason != reason || string(gotPayload) != string(payload) {
		t.Errorf("dead letter is %s with %q, want %s with %q", gotReason, gotPayload, reason, payload)
	}
}

// wantCopies checks how many copies of a message the inbox has counted.
func (b *bundle) wantCopies(t tester, d messaging.Delivery, want int) {
	t.Helper()
	who, err := days.identify(d.ID, time.Now())
	if err != nil {
		t.Fatalf("identify: %v", err)
	}
	var got int
	err = b.db.QueryRow(t.Context(), `SELECT copies FROM inbox WHERE slot = $1 AND consumer = $2 AND message_id = $3`, who.slot, b.group.name, who.id).Scan(&got)
	if err != nil || got != want {
		t.Errorf("%s has counted %d copies, %v, want %d", b.group.name, got, err, want)
	}
}

// wantAway checks that an error says that the database is away and nothing was written.
func wantAway(t tester, err error) {
	t.Helper()
	if !errors.Is(err, postgres.ErrUnavailable) {
		t.Errorf("got error %v, want one that wraps ErrUnavailable", err)
	}
}
