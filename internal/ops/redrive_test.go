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

// desk is a database, and a consumer group on it whose handler counts its effects and fails while it is broken.
type desk struct {
	*pgxpool.Pool
	box    *inbox.Inbox
	broken atomic.Bool
}

var errBroken = messaging.Permanent(errors.New("broken"))

func newDesk(t testing.TB) *desk {
	t.Helper()
	d := &desk{Pool: testenv.Postgres(t)}
	d.exec(t, `CREATE TABLE effects (name text PRIMARY KEY, n integer NOT NULL, seq bigint GENERATED ALWAYS AS IDENTITY)`)
	group := inbox.NewGroup("group")
	inbox.Handle(group, func(ctx context.Context, tx pgx.Tx, message *wrapperspb.StringValue) error {
		if d.broken.Load() {
			return errBroken
		}
		_, err := tx.Exec(ctx, `INSERT INTO effects VALUES ($1, 1) ON CONFLICT (name) DO UPDATE SET n = effects.n + 1`,
			message.GetValue())
		return err
	})
	d.box = inbox.New(d.Pool, group, inbox.Config{})
	return d
}

func (d *desk) exec(t testing.TB, sql string, args ...any) {
	t.Helper()
	if _, err := d.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func delivery(key, text string) messaging.Delivery {
	m := messaging.New(key, wrapperspb.String(text))
	return messaging.Delivery{ID: m.ID.String(), Type: m.Type, Key: key, Payload: m.Payload,
		Headers: map[string]string{"tenant": "a"}}
}

func (d *desk) process(t testing.TB, deliveries ...messaging.Delivery) {
	t.Helper()
	if err := d.box.Process(t.Context(), deliveries); err != nil {
		t.Fatal(err)
	}
}

// fail makes dead letters of deliveries.
func (d *desk) fail(t testing.TB, deliveries ...messaging.Delivery) {
	t.Helper()
	d.broken.Store(true)
	d.process(t, deliveries...)
	d.broken.Store(false)
}

func (d *desk) drain(t testing.TB, deliveries ...messaging.Delivery) {
	t.Helper()
	if err := d.box.Drain(t.Context(), deliveries); err != nil {
		t.Fatal(err)
	}
}

func (d *desk) retry(t testing.TB) {
	t.Helper()
	for {
		switch found, err := d.box.RetryNext(t.Context()); {
		case err != nil:
			t.Fatal(err)
		case !found:
			return
		}
	}
}

// wantEffects checks the effects in their order, each of them once.
func (d *desk) wantEffects(t testing.TB, want ...string) {
	t.Helper()
	d.want(t, "effects", `SELECT CASE n WHEN 1 THEN name ELSE name || ' x' || n END FROM effects ORDER BY seq`, want...)
}

func (d *desk) wantLetters(t testing.TB, want ...string) {
	t.Helper()
	d.want(t, "letters", `SELECT reason || ' ' || coalesce(resolution, 'open') FROM dead_letter ORDER BY id`, want...)
}

func (d *desk) wantAudit(t testing.TB, want ...string) {
	t.Helper()
	d.want(t, "audit", `SELECT format('%s by %s: %s', resolution, actor, reason) FROM dead_letter_audit ORDER BY id`,
		want...)
}

func (d *desk) want(t testing.TB, what, sql string, want ...string) {
	t.Helper()
	rows, err := d.Query(t.Context(), sql)
	if err != nil {
		t.Fatal(err)
	}
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%s: got %q, %v, want %q", what, got, err, want)
	}
}

var order = Selection{Note: deadletter.Note{Actor: "ann", Reason: "mended"}, PerSecond: 1e6, Groups: []string{"group"}}

// redrive returns what became of the letters, as text.
func (d *desk) redrive(t testing.TB, o Selection) []string {
	t.Helper()
	return collect(t, func(each func(Outcome)) error { return Redrive(t.Context(), d.Pool, o, each) })
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

func equal(t testing.TB, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %q, want %q", what, got, want)
	}
}

func TestRedriveAppliesWhatWasNeverApplied(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	first, second := delivery("k", "first"), delivery("k", "second")
	d.fail(t, first, second)
	d.process(t, delivery("k", "third"))
	d.wantLetters(t, "permanent open", "permanent open")
	equal(t, "outcomes", d.redrive(t, order), "redriven", "redriven")
	d.wantEffects(t, "third")
	d.process(t, delivery("k", "fourth")) // behind them, on their key
	d.retry(t)
	d.process(t, first, second) // late copies
	d.wantEffects(t, "third", "first", "second", "fourth")
	d.wantLetters(t, "permanent redriven", "permanent redriven")
	d.wantAudit(t, "redriven by ann: mended", "redriven by ann: mended")
	if again := d.redrive(t, order); again != nil {
		t.Errorf("resolved letters are redriven again: %q", again)
	}
}

// A message that fails again is another letter.
func TestRedriveInVain(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	d.fail(t, delivery("", "m"))
	d.redrive(t, order)
	d.broken.Store(true)
	d.retry(t)
	d.wantLetters(t, "permanent redriven", "permanent open")
	d.broken.Store(false)
	d.redrive(t, order)
	d.retry(t)
	d.wantEffects(t, "m")
}

// What the broker gave up may have been applied before, or be applied after.
func TestRedriveOfUndelivered(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	before, after, never := delivery("", "before"), delivery("", "after"), delivery("", "never")
	d.process(t, before)
	d.drain(t, before, after, never)
	d.drain(t, before, after, never) // the broker may hand it over twice
	d.wantLetters(t, "undelivered open", "undelivered open", "undelivered open")
	d.process(t, after)
	equal(t, "outcomes", d.redrive(t, order), "duplicate", "duplicate", "redriven")
	d.retry(t)
	d.process(t, never)
	d.wantEffects(t, "before", "after", "never")
}

func TestRedriveOfTheRelaysLetters(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	young, old := uuid.Must(uuid.NewV7()), uuid.Must(uuid.NewV7())
	oldest := uint64(time.Now().Add(-30 * 24 * time.Hour).UnixMilli())
	for i := range 6 {
		old[i] = byte(oldest >> (40 - 8*i))
	}
	err := postgres.Transact(t.Context(), d.Pool, func(tx pgx.Tx) error {
		letter := deadletter.Letter{Type: "type", Key: "k", Payload: []byte{0, 255},
			Headers: map[string]string{"tenant": "a"}, Reason: deadletter.Unroutable}
		other := letter
		letter.MessageID, other.MessageID = young.String(), old.String()
		return deadletter.Insert(t.Context(), tx, letter, other)
	})
	if err != nil {
		t.Fatal(err)
	}
	outcomes := d.redrive(t, order)
	if len(outcomes) != 2 || outcomes[0] != "redriven" || !strings.Contains(outcomes[1], "force it") {
		t.Errorf("outcomes: %q", outcomes)
	}
	forced := order
	forced.Force = true
	equal(t, "outcomes", d.redrive(t, forced), "redriven")
	d.want(t, "log", `SELECT format('%s %s %s %s %s', type, key, encode(payload, 'hex'), headers ->> 'tenant', message_id = '`+young.String()+`') FROM outbox ORDER BY id`,
		"type k 00ff a t", "type k 00ff a f")
	d.want(t, "detail", `SELECT count(*)::text FROM dead_letter_audit JOIN outbox ON detail = 'published as ' || message_id`, "1")
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
		"TooOld": {deadletter.Letter{Consumer: "group", MessageID: "a", Reason: deadletter.OutsideWindow},
			false, "force it"},
		"TooOldForced": {deadletter.Letter{Consumer: "group", MessageID: "a", Reason: deadletter.OutsideWindow},
			true, ""},
		"Malformed": {deadletter.Letter{Consumer: "group", MessageID: "a", Reason: deadletter.Malformed}, true,
			"discard it"},
		"UnknownGroup": {deadletter.Letter{Consumer: "gone", MessageID: "a", Reason: deadletter.Exhausted}, true,
			`no consumer group "gone"`},
		"RelaysInvalidID": {deadletter.Letter{MessageID: "a", Type: "t", Reason: deadletter.Malformed}, true,
			"message ID"},
		"RelaysBadMessage": {deadletter.Letter{MessageID: uuid.Must(uuid.NewV7()).String(),
			Reason: deadletter.Malformed}, true, "type"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDesk(t)
			test.letter.Headers = map[string]string{}
			err := postgres.Transact(t.Context(), d.Pool,
				func(tx pgx.Tx) error { return deadletter.Insert(t.Context(), tx, test.letter) })
			if err != nil {
				t.Fatal(err)
			}
			forced := order
			forced.Force = test.forced
			got := d.redrive(t, forced)
			if test.want == "" {
				equal(t, "outcomes", got, "redriven")
				return
			}
			if len(got) != 1 || !strings.HasPrefix(got[0], "refused: ") || !strings.Contains(got[0], test.want) {
				t.Errorf("got %q, want a refusal with %q", got, test.want)
			}
			d.wantLetters(t, string(test.letter.Reason)+" open")
			d.wantAudit(t)
		})
	}
	for _, note := range []deadletter.Note{{}, {Actor: "ann", Reason: "  "}, {Reason: "mended"}} {
		if err := Redrive(t.Context(), nil, Selection{Note: note}, nil); err == nil {
			t.Errorf("%+v is enough of a note", note)
		}
	}
}

func TestDryRunChangesNothing(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	applied := delivery("", "applied")
	d.process(t, applied)
	d.drain(t, applied)
	d.fail(t, delivery("", "failed"))
	rehearsal := order
	rehearsal.DryRun = true
	equal(t, "outcomes", d.redrive(t, rehearsal), "duplicate", "redriven")
	equal(t, "discarded", collect(t, func(each func(Outcome)) error {
		return Discard(t.Context(), d.Pool, rehearsal,
			each)
	}), "discarded", "discarded")
	d.wantLetters(t, "undelivered open", "permanent open")
	d.wantAudit(t)
	d.want(t, "retries", `SELECT message_id FROM inbox_retry`)
}

func TestDiscard(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	d.fail(t, delivery("a", "m"), delivery("b", "m"), delivery("b", "m"))
	chosen := order
	chosen.Filter.Key = "b"
	equal(t, "outcomes", collect(t, func(each func(Outcome)) error {
		return Discard(t.Context(), d.Pool, chosen,
			each)
	}), "discarded", "discarded")
	d.wantLetters(t, "permanent open", "permanent discarded", "permanent discarded")
	d.wantAudit(t, "discarded by ann: mended", "discarded by ann: mended")
}

// Several people, or one who is impatient.
func TestRedrivesAtOnce(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	var deliveries []messaging.Delivery
	var texts []string
	for i := range 150 { // more than a page
		texts = append(texts, fmt.Sprintf("m%03d", i))
		deliveries = append(deliveries, delivery("k", texts[i]))
	}
	d.fail(t, deliveries...)
	var redriven atomic.Int32
	var people sync.WaitGroup
	for range 3 {
		people.Go(func() {
			err := Redrive(t.Context(), d.Pool, order, func(o Outcome) {
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
	people.Wait()
	if n := redriven.Load(); n != 150 {
		t.Errorf("%d were redriven", n)
	}
	d.retry(t)
	d.want(t, "effects", `SELECT count(*) || ' ' || max(n) FROM effects`, "150 1")
}

func TestRedriveKeepsToItsRate(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	for range 5 {
		d.fail(t, delivery("", "m"))
	}
	slow := order
	slow.PerSecond = 20
	began := time.Now()
	d.redrive(t, slow)
	if took := time.Since(began); took < 190*time.Millisecond { // the first at once, four at 50 ms
		t.Errorf("took %s", took)
	}
}

func TestTrace(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	message := messaging.New("k", wrapperspb.String("m"))
	err := postgres.Transact(t.Context(), d.Pool,
		func(tx pgx.Tx) error { return outbox.Insert(t.Context(), tx, message) })
	if err != nil {
		t.Fatal(err)
	}
	d.fail(t, messaging.Delivery{ID: message.ID.String(), Type: message.Type, Key: "k", Payload: message.Payload})
	journey, err := Trace(t.Context(), d.Pool, message.ID.String())
	if err != nil {
		t.Fatal(err)
	}
	if len(journey.Log) != 1 || len(journey.Groups) != 1 || len(journey.Letters) != 1 {
		t.Fatalf("got %+v", journey)
	}
	if g, l := journey.Groups[0], journey.Letters[0]; g.Consumer != "group" || g.Waits ||
		l.Reason != deadletter.Permanent {
		t.Errorf("got %+v", journey)
	}
	for _, unknown := range []string{uuid.NewString(), "", "text \x00"} {
		if journey, err := Trace(t.Context(), d.Pool, unknown); len(journey.Log)+len(journey.Groups)+
			len(journey.Letters) != 0 {
			t.Errorf("%q: got %+v, %v", unknown, journey, err)
		}
	}
}
