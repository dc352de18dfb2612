package ops

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// fixture is a database with a consumer group whose handler counts its effects, and fails while broken is set.
type fixture struct {
	*pgxpool.Pool
	box    *inbox.Inbox
	broken atomic.Bool
}

var errBroken = messaging.Permanent(errors.New("broken"))

func newFixture(t testing.TB) *fixture {
	t.Helper()
	f := &fixture{Pool: testenv.Postgres(t)}
	f.exec(t, `CREATE TABLE effects (name text PRIMARY KEY, n integer NOT NULL, seq bigint GENERATED ALWAYS AS IDENTITY)`)
	group := inbox.NewGroup("group")
	inbox.Handle(group, func(ctx context.Context, tx pgx.Tx, message *wrapperspb.StringValue) error {
		if f.broken.Load() {
			return errBroken
		}
		_, err := tx.Exec(ctx, `
			INSERT INTO effects VALUES ($1, 1)
			ON CONFLICT (name) DO UPDATE SET n = effects.n + 1`, message.GetValue())
		return err
	})
	f.box = inbox.New(f.Pool, group, inbox.Config{})
	return f
}

func (f *fixture) exec(t testing.TB, sql string, args ...any) {
	t.Helper()
	if _, err := f.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func delivery(key, text string) messaging.Delivery {
	m := messaging.New(key, wrapperspb.String(text))
	return messaging.Delivery{
		ID: m.ID.String(), Type: m.Type, Key: key, Payload: m.Payload, Headers: map[string]string{"tenant": "a"},
	}
}

func (f *fixture) process(t testing.TB, deliveries ...messaging.Delivery) {
	t.Helper()
	if err := f.box.Process(t.Context(), deliveries); err != nil {
		t.Fatal(err)
	}
}

// fail makes deliveries dead letters.
func (f *fixture) fail(t testing.TB, deliveries ...messaging.Delivery) {
	t.Helper()
	f.broken.Store(true)
	f.process(t, deliveries...)
	f.broken.Store(false)
}

func (f *fixture) drain(t testing.TB, deliveries ...messaging.Delivery) {
	t.Helper()
	if err := f.box.Drain(t.Context(), deliveries); err != nil {
		t.Fatal(err)
	}
}

func (f *fixture) retry(t testing.TB) {
	t.Helper()
	for {
		switch found, err := f.box.RetryNext(t.Context()); {
		case err != nil:
			t.Fatal(err)
		case !found:
			return
		}
	}
}

// wantEffects checks the effects in their order. Each must be there once.
func (f *fixture) wantEffects(t testing.TB, want ...string) {
	t.Helper()
	f.want(t, "effects", `SELECT CASE n WHEN 1 THEN name ELSE name || ' x' || n END FROM effects ORDER BY seq`, want...)
}

func (f *fixture) wantLetters(t testing.TB, want ...string) {
	t.Helper()
	f.want(t, "dead letters", `SELECT reason || ' ' || coalesce(resolution, 'open') FROM dead_letter ORDER BY id`, want...)
}

func (f *fixture) wantAudit(t testing.TB, want ...string) {
	t.Helper()
	f.want(t, "audit", `
		SELECT format('%s by %s: %s', resolution, actor, reason) FROM dead_letter_audit ORDER BY id`, want...)
}

func (f *fixture) want(t testing.TB, name, sql string, want ...string) {
	t.Helper()
	rows, err := f.Query(t.Context(), sql)
	if err != nil {
		t.Fatal(err)
	}
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%s: got %q, %v, want %q", name, got, err, want)
	}
}

var all = Selection{
	Note: deadletter.Note{Actor: "ann", Reason: "fixed"}, PerSecond: 1e6, Groups: []Group{{Name: "group"}},
}

// redrive returns the outcomes of a redrive as text.
func (f *fixture) redrive(t testing.TB, selection Selection) []string {
	t.Helper()
	return collect(t, func(each func(Outcome)) error { return Redrive(t.Context(), f.Pool, selection, each) })
}

func collect(t testing.TB, do func(each func(Outcome)) error) (outcomes []string) {
	t.Helper()
	err := do(func(o Outcome) {
		if o.Err != nil {
			outcomes = append(outcomes, "refused: "+o.Err.Error())
		} else {
			outcomes = append(outcomes, string(o.Resolution))
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return outcomes
}

func equal(t testing.TB, name string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %q, want %q", name, got, want)
	}
}

func TestRedriveAppliesWhatWasNeverApplied(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	first, second := delivery("k", "first"), delivery("k", "second")
	f.fail(t, first, second)
	f.process(t, delivery("k", "third"))
	f.wantLetters(t, "permanent open", "permanent open")
	equal(t, "outcomes", f.redrive(t, all), "redriven", "redriven")
	f.wantEffects(t, "third")
	f.process(t, delivery("k", "fourth")) // waits behind them, because of its key
	f.retry(t)
	f.process(t, first, second) // late copies
	f.wantEffects(t, "third", "first", "second", "fourth")
	f.wantLetters(t, "permanent redriven", "permanent redriven")
	f.wantAudit(t, "redriven by ann: fixed", "redriven by ann: fixed")
	if again := f.redrive(t, all); again != nil {
		t.Errorf("resolved dead letters were redriven again: %q", again)
	}
}

// A message that fails again becomes another dead letter.
func TestRedriveThatFailsAgain(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.fail(t, delivery("", "m"))
	f.redrive(t, all)
	f.broken.Store(true)
	f.retry(t)
	f.wantLetters(t, "permanent redriven", "permanent open")
	f.broken.Store(false)
	f.redrive(t, all)
	f.retry(t)
	f.wantEffects(t, "m")
}

// A message that the broker stopped delivering may have been applied before, or may be applied later.
func TestRedriveOfUndelivered(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	before, after, never := delivery("", "before"), delivery("", "after"), delivery("", "never")
	f.process(t, before)
	f.drain(t, before, after, never)
	f.drain(t, before, after, never) // the broker may deliver the dead letter twice
	f.wantLetters(t, "undelivered open", "undelivered open", "undelivered open")
	f.process(t, after)
	equal(t, "outcomes", f.redrive(t, all), "duplicate", "duplicate", "redriven")
	f.retry(t)
	f.process(t, never)
	f.wantEffects(t, "before", "after", "never")
}

func TestRedriveOfTheRelaysDeadLetters(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	young, old := uuid.Must(uuid.NewV7()), uuid.Must(uuid.NewV7())
	oldest := uint64(time.Now().Add(-30 * 24 * time.Hour).UnixMilli())
	for i := range 6 {
		old[i] = byte(oldest >> (40 - 8*i))
	}
	err := postgres.Transact(t.Context(), f.Pool, func(tx pgx.Tx) error {
		letter := deadletter.Letter{
			Type: "type", Key: "k", Payload: []byte{0, 255}, Headers: map[string]string{"tenant": "a"},
			Reason: deadletter.Unroutable,
		}
		other := letter
		letter.MessageID, other.MessageID = young.String(), old.String()
		return deadletter.Insert(t.Context(), tx, letter, other)
	})
	if err != nil {
		t.Fatal(err)
	}
	outcomes := f.redrive(t, all)
	if len(outcomes) != 2 || outcomes[0] != "redriven" || !strings.Contains(outcomes[1], "force it") {
		t.Errorf("outcomes: %q", outcomes)
	}
	forced := all
	forced.Force = true
	equal(t, "outcomes", f.redrive(t, forced), "redriven")
	f.want(t, "log", `
		SELECT format('%s %s %s %s %s', type, key, encode(payload, 'hex'), headers ->> 'tenant',
			message_id = '`+young.String()+`') FROM outbox ORDER BY id`,
		"type k 00ff a t", "type k 00ff a f")
	f.want(t, "detail", `
		SELECT count(*)::text FROM dead_letter_audit JOIN outbox ON detail = 'published as ' || message_id`, "1")
}

func TestRedriveRefuses(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		letter deadletter.Letter
		forced bool
		want   string
	}{
		"NoID":       {deadletter.Letter{Consumer: "group", Reason: deadletter.NoID}, false, "force it"},
		"NoIDForced": {deadletter.Letter{Consumer: "group", Reason: deadletter.NoID}, true, ""},
		"TooOld": {
			deadletter.Letter{Consumer: "group", MessageID: "a", Reason: deadletter.OutsideWindow}, false, "force it",
		},
		"TooOldForced": {
			deadletter.Letter{Consumer: "group", MessageID: "a", Reason: deadletter.OutsideWindow}, true, "",
		},
		"Malformed": {
			deadletter.Letter{Consumer: "group", MessageID: "a", Reason: deadletter.Malformed}, true, "discard it",
		},
		"UnknownGroup": {
			deadletter.Letter{Consumer: "gone", MessageID: "a", Reason: deadletter.Exhausted}, true, `"gone" no longer`,
		},
		"RelaysInvalidID": {
			deadletter.Letter{MessageID: "a", Type: "t", Reason: deadletter.Malformed}, true, "message ID",
		},
		"RelaysBadMessage": {
			deadletter.Letter{MessageID: uuid.Must(uuid.NewV7()).String(), Reason: deadletter.Malformed}, true, "type",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			test.letter.Headers = map[string]string{}
			err := postgres.Transact(t.Context(), f.Pool, func(tx pgx.Tx) error {
				return deadletter.Insert(t.Context(), tx, test.letter)
			})
			if err != nil {
				t.Fatal(err)
			}
			forced := all
			forced.Force = test.forced
			got := f.redrive(t, forced)
			if test.want == "" {
				equal(t, "outcomes", got, "redriven")
				return
			}
			if len(got) != 1 || !strings.HasPrefix(got[0], "refused: ") || !strings.Contains(got[0], test.want) {
				t.Errorf("got %q, want a refusal with %q", got, test.want)
			}
			f.wantLetters(t, string(test.letter.Reason)+" open")
			f.wantAudit(t)
		})
	}
	for _, note := range []deadletter.Note{{}, {Actor: "ann", Reason: "  "}, {Reason: "fixed"}} {
		if err := Redrive(t.Context(), nil, Selection{Note: note}, nil); err == nil {
			t.Errorf("accepted the note %+v", note)
		}
	}
}

func TestDryRunChangesNothing(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	applied := delivery("", "applied")
	f.process(t, applied)
	f.drain(t, applied)
	f.fail(t, delivery("", "failed"))
	dryRun := all
	dryRun.DryRun = true
	equal(t, "outcomes of the redrive", f.redrive(t, dryRun), "duplicate", "redriven")
	discarded := collect(t, func(each func(Outcome)) error { return Discard(t.Context(), f.Pool, dryRun, each) })
	equal(t, "outcomes of the discard", discarded, "discarded", "discarded")
	f.wantLetters(t, "undelivered open", "permanent open")
	f.wantAudit(t)
	f.want(t, "retries", `SELECT message_id FROM inbox_retry`)
}

func TestDiscard(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.fail(t, delivery("a", "m"), delivery("b", "m"), delivery("b", "m"))
	some := all
	some.Filter.Key = "b"
	outcomes := collect(t, func(each func(Outcome)) error { return Discard(t.Context(), f.Pool, some, each) })
	equal(t, "outcomes", outcomes, "discarded", "discarded")
	f.wantLetters(t, "permanent open", "permanent discarded", "permanent discarded")
	f.wantAudit(t, "discarded by ann: fixed", "discarded by ann: fixed")
}

// Several operators may redrive at once, or one operator several times.
func TestRedrivesAtOnce(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	var deliveries []messaging.Delivery
	var texts []string
	for i := range 150 { // more than a page
		texts = append(texts, fmt.Sprintf("m%03d", i))
		deliveries = append(deliveries, delivery("k", texts[i]))
	}
	f.fail(t, deliveries...)
	var redriven atomic.Int32
	var operators sync.WaitGroup
	for range 3 {
		operators.Go(func() {
			err := Redrive(t.Context(), f.Pool, all, func(o Outcome) {
				switch {
				case o.Err == nil:
					redriven.Add(1)
				case !errors.Is(o.Err, errNotOpen):
					t.Error(o.Err)
				}
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	operators.Wait()
	if n := redriven.Load(); n != 150 {
		t.Errorf("%d were redriven", n)
	}
	f.retry(t)
	f.want(t, "effects", `SELECT count(*) || ' ' || max(n) FROM effects`, "150 1")
}

func TestRedriveKeepsToItsRate(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	for range 5 {
		f.fail(t, delivery("", "m"))
	}
	slow := all
	slow.PerSecond = 20
	began := time.Now()
	f.redrive(t, slow)
	if took := time.Since(began); took < 190*time.Millisecond { // the first at once, the others after 50 ms each
		t.Errorf("took %s", took)
	}
}

func TestTrace(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	message := messaging.New("k", wrapperspb.String("m"))
	err := postgres.Transact(t.Context(), f.Pool, func(tx pgx.Tx) error {
		return outbox.Insert(t.Context(), tx, message)
	})
	if err != nil {
		t.Fatal(err)
	}
	f.fail(t, messaging.Delivery{ID: message.ID.String(), Type: message.Type, Key: "k", Payload: message.Payload})
	trace, err := Trace(t.Context(), f.Pool, message.ID.String())
	if err != nil {
		t.Fatal(err)
	}
	if len(trace.Log) != 1 || len(trace.Groups) != 1 || len(trace.Letters) != 1 {
		t.Fatalf("got %+v", trace)
	}
	g, l := trace.Groups[0], trace.Letters[0]
	if g.Consumer != "group" || g.Waits || l.Reason != deadletter.Permanent {
		t.Errorf("got %+v", trace)
	}
	for _, unknown := range []string{uuid.NewString(), "", "text \x00"} {
		trace, err := Trace(t.Context(), f.Pool, unknown)
		if len(trace.Log)+len(trace.Groups)+len(trace.Letters) != 0 {
			t.Errorf("%q: got %+v, %v", unknown, trace, err)
		}
	}
}
