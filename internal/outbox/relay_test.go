package outbox

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

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// broker is a messaging.Publisher whose verdicts and failures the test controls. The real publisher is tested in
// internal/rabbit, and together with the relay in internal/app.
type broker struct {
	mu       sync.Mutex
	stored   []string // in the order in which the broker stored them
	sizes    []int    // of the pages
	closed   int
	verdict  func(text string, page []string) error // nil: the broker confirms everything
	onPage   func(page []string) error              // what Publish returns
	complete chan struct{}                          // closed when wanted texts are stored
	wanted   int
}

func newBroker(wanted int) *broker {
	return &broker{wanted: wanted, complete: make(chan struct{})}
}

func (b *broker) Publish(_ context.Context, messages []messaging.Message) (messaging.Receipt, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	page := make([]string, len(messages))
	for i, m := range messages {
		var body wrapperspb.StringValue
		if err := proto.Unmarshal(m.Payload, &body); err != nil {
			return nil, err
		}
		page[i] = body.GetValue()
	}
	b.sizes = append(b.sizes, len(page))
	if b.onPage != nil {
		if err := b.onPage(page); err != nil {
			return nil, err
		}
	}
	verdicts := make(verdicts, len(page))
	for i, text := range page {
		if b.verdict != nil {
			verdicts[i] = b.verdict(text, page)
		}
		if verdicts[i] == nil {
			b.stored = append(b.stored, text)
		}
	}
	if b.wanted > 0 && len(b.firstCopies()) >= b.wanted {
		close(b.complete)
		b.wanted = 0
	}
	return verdicts, nil
}

func (b *broker) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed++
	return nil
}

type verdicts []error

func (v verdicts) Wait(context.Context) []error { return v }

func (b *broker) firstCopies() []string {
	var first []string
	for _, text := range b.stored {
		if !slices.Contains(first, text) {
			first = append(first, text)
		}
	}
	return first
}

// start runs a relay until the test ends or stop is called.
func start(t *testing.T, db *pgxpool.Pool, b messaging.Publisher, config Config) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := NewRelay(db, func() messaging.Publisher { return b }, config).Run(ctx); err != nil {
			t.Error(err)
		}
	})
	stop = func() { cancel(); running.Wait() }
	t.Cleanup(stop)
	return stop
}

func await(t *testing.T, what string, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatalf("%s: did not happen within 30 s", what)
	}
}

type letter struct{ Text, Reason string }

func parked(t *testing.T, db *pgxpool.Pool) (letters []letter, published, inCursor int) {
	t.Helper()
	rows, err := db.Query(t.Context(), `SELECT payload, reason FROM dead_letter WHERE consumer = '' ORDER BY id`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var payload []byte
		var scanned letter
		if err := rows.Scan(&payload, &scanned.Reason); err != nil {
			t.Fatal(err)
		}
		scanned.Text = text(t, messaging.Message{Payload: payload})
		letters = append(letters, scanned)
	}
	const countsSQL = `SELECT published, parked FROM outbox_cursor`
	if err := db.QueryRow(t.Context(), countsSQL).Scan(&published, &inCursor); err != nil {
		t.Fatal(err)
	}
	return letters, published, inCursor
}

func TestRelay(t *testing.T) {
	t.Parallel()

	t.Run("PublishesEachMessageOnceInOrderWhenNothingFails", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		for _, text := range numbered(50) {
			insert(t, db, "k", text)
		}
		b := newBroker(50)
		stop := start(t, db, b, Config{PageRows: 7})
		await(t, "all", b.complete)
		insert(t, db, "k", "m050") // no doorbell rings: polling finds it
		testenv.Eventually(t, 10*time.Second, func() error {
			b.mu.Lock()
			defer b.mu.Unlock()
			if len(b.stored) < 51 {
				return errors.New("not polled")
			}
			return nil
		})
		stop()
		equal(t, "stored", b.stored, numbered(51))
		letters, published, _ := parked(t, db)
		equal(t, "published", published, 51)
		equal(t, "parked", len(letters), 0)

		next := newBroker(1) // the next relay has nothing to repeat
		insert(t, db, "k", "m051")
		start(t, db, next, Config{})
		await(t, "next", next.complete)
		equal(t, "stored by the next relay", next.stored, []string{"m051"})
	})

	t.Run("ParksTheUnroutableAndGoesOn", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		for _, text := range numbered(20) {
			insert(t, db, "", text)
		}
		b := newBroker(18)
		b.verdict = func(text string, _ []string) error {
			if text == "m003" || text == "m011" {
				return fmt.Errorf("%w: 312 NO_ROUTE", messaging.ErrReturned)
			}
			return nil
		}
		stop := start(t, db, b, Config{PageRows: 5})
		await(t, "the others", b.complete)
		stop()
		letters, published, inCursor := parked(t, db)
		equal(t, "letters", letters, []letter{{"m003", "unroutable"}, {"m011", "unroutable"}})
		equal(t, "published", published, 18)
		equal(t, "parked", inCursor, 2)
		equal(t, "stored", len(b.stored), 18)
	})

	t.Run("ParksWhatWasNotChecked", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		const sql = `INSERT INTO outbox_message (type, payload, key, headers, id, checked, made_at)
			VALUES ('probe.P', '', 'k', '{}', outbox_uuidv7(), true, clock_timestamp())`
		bad := []string{
			strings.Replace(sql, `{}`, `[]`, 1),
			strings.Replace(sql, `{}`, `{"a": 1, "b": "x"}`, 1),
			strings.Replace(sql, `{}`, `{"a": null}`, 1),
			strings.Replace(sql, `{}`, `null`, 1),
			strings.Replace(sql, `{}`, `{"CC": "elsewhere"}`, 1),
			strings.Replace(sql, `outbox_uuidv7()`, `gen_random_uuid()`, 1),
			strings.Replace(sql, `probe.P`, `a.*`, 1),
			strings.Replace(sql, `'k'`, `repeat('k', 256)`, 1),
			strings.Replace(sql, `''`, `decode(repeat('00', 1048577), 'hex')`, 1),
		}
		insert(t, db, "k", "m000")
		for _, sql := range bad {
			exec(t, db, sql)
		}
		insert(t, db, "k", "m001")
		b := newBroker(2)
		stop := start(t, db, b, Config{})
		await(t, "the others", b.complete)
		stop()
		equal(t, "stored", b.stored, numbered(2))
		var inCursor, malformed int
		err := db.QueryRow(t.Context(), `
			SELECT parked, (SELECT count(*) FROM dead_letter WHERE reason = 'malformed')
			FROM outbox_cursor`).Scan(&inCursor, &malformed)
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "parked and malformed", []int{inCursor, malformed}, []int{len(bad), len(bad)})
		again := newBroker(0)
		published, leftOut := replay(t, db, again, ReplayFilter{})
		equal(t, "replayed", again.stored, numbered(2))
		equal(t, "replayed and left out", []int{published, leftOut}, []int{2, len(bad)})
	})

	t.Run("FindsWhatTheBrokerRefusesAndRepeatsTheRestOnce", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		for _, text := range numbered(50) {
			insert(t, db, "", text)
		}
		b := newBroker(49)
		b.verdict = func(text string, page []string) error {
			// The channel closes over m013. The messages before it are stored, but their confirms may be lost with it.
			if i := slices.Index(page, "m013"); i >= 0 {
				if text < "m013" {
					b.stored = append(b.stored, text)
				}
				return fmt.Errorf("%w: 406", messaging.ErrRefused)
			}
			return nil
		}
		stop := start(t, db, b, Config{PageRows: 10})
		await(t, "the others", b.complete)
		stop()
		letters, _, _ := parked(t, db)
		equal(t, "letters", letters, []letter{{"m013", "refused"}})
		for _, text := range numbered(50) {
			if n := count(b.stored, text); n > 2 {
				t.Errorf("%s was stored %d times", text, n)
			}
		}
		if b.sizes[len(b.sizes)-1] == 1 {
			t.Errorf("pages stayed small: %v", b.sizes)
		}
	})

	t.Run("DoesNotBlameASingleMessagePageForTheNextPage", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		insert(t, db, "", "m000")
		insert(t, db, "", "m001") // the culprit
		insert(t, db, "", "m002")
		b := newBroker(2)
		closed := false
		b.verdict = func(text string, page []string) error {
			// Two pages are in flight. The channel closes over the second, and the first one's confirm is lost with it.
			switch {
			case text == "m001", text == "m000" && !closed:
				closed = true
				return fmt.Errorf("%w: 406", messaging.ErrRefused)
			}
			return nil
		}
		stop := start(t, db, b, Config{PageRows: 1})
		await(t, "the others", b.complete)
		testenv.Eventually(t, 10*time.Second, func() error {
			if letters, published, _ := parked(t, db); len(letters) == 0 || published < 2 {
				return errors.New("not settled")
			}
			return nil
		})
		stop()
		letters, _, _ := parked(t, db)
		equal(t, "letters", letters, []letter{{"m001", "refused"}})
	})

	t.Run("SendsFromTheFirstNackedMessageAgain", func(t *testing.T) {
		t.Parallel()
		for _, verdict := range []error{messaging.ErrNacked, messaging.ErrUnknown} {
			t.Run(strings.ReplaceAll(verdict.Error(), " ", "_"), func(t *testing.T) {
				t.Parallel()
				db := testenv.Postgres(t)
				for _, text := range numbered(20) {
					insert(t, db, "", text)
				}
				b := newBroker(20)
				failures := 3
				b.verdict = func(text string, _ []string) error {
					if text == "m007" && failures > 0 {
						failures--
						return verdict
					}
					return nil
				}
				stop := start(t, db, b, Config{PageRows: 5})
				await(t, "all", b.complete)
				stop()
				letters, published, _ := parked(t, db)
				equal(t, "letters", len(letters), 0)
				equal(t, "published", published, 20)
				for i, text := range numbered(20) {
					if n := count(b.stored, text); n < 1 || i < 7 && n != 1 {
						t.Errorf("%s was stored %d times", text, n)
					}
				}
			})
		}
	})

	t.Run("KeepsTheOrderOfFirstCopiesThroughLostConnections", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		for _, text := range numbered(40) {
			insert(t, db, "k", text)
		}
		b := newBroker(40)
		pages := 0
		b.onPage = func(page []string) error {
			if pages++; pages%3 == 0 { // half of the page is stored, and its confirms are lost
				b.stored = append(b.stored, page[:len(page)/2]...)
				return errors.New("connection lost")
			}
			return nil
		}
		stop := start(t, db, b, Config{PageRows: 6, PollInterval: 10 * time.Millisecond})
		await(t, "all", b.complete)
		stop()
		equal(t, "first copies", b.firstCopies(), numbered(40))
		_, published, _ := parked(t, db)
		equal(t, "published", published, 40)
	})

	t.Run("PublishesNothingThatItHasNotClaimed", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		insert(t, db, "", "m000")
		b := newBroker(1)
		var claimed string
		b.onPage = func([]string) error {
			return db.QueryRow(context.Background(), `SELECT coalesce(claimed::text, '') FROM outbox_cursor`).Scan(&claimed)
		}
		stop := start(t, db, b, Config{})
		await(t, "all", b.complete)
		stop()
		var visible bool
		const visibleSQL = `SELECT bool_and(pg_visible_in_snapshot(xid, $1::text::pg_snapshot)) FROM outbox`
		err := db.QueryRow(t.Context(), visibleSQL, claimed).Scan(&visible)
		if err != nil || !visible {
			t.Fatalf("published before its snapshot was committed: claimed %q, %v", claimed, err)
		}
	})

	t.Run("ContinuesAfterTheDatabaseWasDown", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		proxy, url := testenv.ProxyURL(t, db.Config().ConnString())
		far, err := pgxpool.New(t.Context(), url)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(far.Close)
		for _, text := range numbered(30) {
			insert(t, db, "k", text)
		}
		b := newBroker(30)
		cuts := 0
		b.onPage = func([]string) error {
			if cuts++; cuts%4 == 0 && cuts < 20 {
				proxy.Cut()
			}
			return nil
		}
		stop := start(t, far, b, Config{PageRows: 4, Lease: time.Second})
		await(t, "all", b.complete)
		stop()
		equal(t, "first copies", b.firstCopies(), numbered(30))
	})
}

// slowBroker confirms one page in two parts. The second part arrives only after the wait was interrupted.
type slowBroker struct {
	*broker
	waiting chan struct{}
}

func (b *slowBroker) Publish(ctx context.Context, messages []messaging.Message) (messaging.Receipt, error) {
	final, err := b.broker.Publish(ctx, messages)
	return &slowReceipt{verdicts: final.(verdicts), waiting: b.waiting}, err
}

type slowReceipt struct {
	verdicts verdicts
	waiting  chan struct{}
	waits    int
}

func (r *slowReceipt) Wait(ctx context.Context) []error {
	if r.waits++; r.waits > 1 {
		return r.verdicts
	}
	close(r.waiting)
	<-ctx.Done()
	return append(slices.Clone(r.verdicts[:2]), slices.Repeat([]error{messaging.ErrUnknown}, len(r.verdicts)-2)...)
}

func TestAPageIsCountedOnceWhenTheRelayIsStoppedInTheMiddle(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	fillProbes(t, db, 5)
	b := &slowBroker{broker: newBroker(0), waiting: make(chan struct{})}
	b.verdict = func(text string, _ []string) error {
		if text == "m000" {
			return messaging.ErrReturned
		}
		return nil
	}
	stop := start(t, db, b, Config{})
	await(t, "the wait", b.waiting)
	stop()
	letters, published, inCursor := parked(t, db)
	equal(t, "letters", letters, []letter{{"m000", "unroutable"}})
	equal(t, "published, parked", []int{published, inCursor}, []int{4, 1})
}

// silentBroker stores pages immediately, but confirms nothing until speaks is closed.
type silentBroker struct {
	*broker
	pages  chan int // written pages, by size
	speaks chan struct{}
}

func (b *silentBroker) Publish(ctx context.Context, messages []messaging.Message) (messaging.Receipt, error) {
	final, err := b.broker.Publish(ctx, messages)
	b.pages <- len(messages)
	return &silentReceipt{final.(verdicts), b.speaks}, err
}

type silentReceipt struct {
	verdicts verdicts
	speaks   chan struct{}
}

func (r *silentReceipt) Wait(ctx context.Context) []error {
	select {
	case <-r.speaks:
		return r.verdicts
	case <-ctx.Done():
		return slices.Repeat([]error{fmt.Errorf("%w: %w", messaging.ErrUnknown, ctx.Err())}, len(r.verdicts))
	}
}

func TestTheDoorbellIsHeardWhileTheBrokerIsSilent(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	b := &silentBroker{broker: newBroker(0), pages: make(chan int, 10), speaks: make(chan struct{})}
	relay := NewRelay(db, func() messaging.Publisher { return b }, Config{})
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := relay.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	defer running.Wait()
	defer cancel()
	written := func(what string) {
		t.Helper()
		select {
		case <-b.pages:
		case <-time.After(30 * time.Second):
			t.Fatalf("%s was not written", what)
		}
	}
	insert(t, db, "k", "m000")
	written("the first page")
	insert(t, db, "k", "m001")
	relay.Ring()
	written("the second page, with the first one unconfirmed")
	// There is no room for a third page: more pages in flight would mean more to repeat after a crash.
	insert(t, db, "k", "m002")
	relay.Ring()
	select {
	case <-b.pages:
		t.Error("a third page is in flight")
	case <-time.After(300 * time.Millisecond):
	}
	close(b.speaks)
	written("the third page")
	cancel()
	running.Wait()
	equal(t, "stored", b.stored, numbered(3))
	_, published, _ := parked(t, db)
	equal(t, "published", published, 3)
}

// reads counts the statements that read the log.
type reads struct{ atomic.Int32 }

func (r *reads) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	if strings.Contains(data.SQL, "WITH fresh AS") {
		r.Add(1)
	}
	return ctx
}

func (r *reads) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// A single message costs two reads of the log, one that finds it and one that finds nothing more. Each read visits
// every slot.
func TestTheLogIsNotReadInVain(t *testing.T) {
	t.Parallel()
	config, err := pgxpool.ParseConfig(testenv.PostgresURL(t))
	if err != nil {
		t.Fatal(err)
	}
	var counted reads
	config.ConnConfig.Tracer = &counted
	db, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	held, at, err := acquire(t.Context(), db, 0, "test", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	b := newBroker(0)
	relay := NewRelay(db, nil, Config{})
	r := (&lease{relay: relay, publisher: b, wake: NewLocalBell(), pause: newPause(time.Second)}).newRun(held, at)
	insert(t, db, "", "m000")
	var done []string
	for idle := false; !idle; {
		if idle, err = r.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		done = append(done,
			fmt.Sprintf("%d stored, %d in flight, reads: %d", len(b.stored), len(r.inFlight), counted.Load()))
	}
	equal(t, "steps", done, []string{
		"1 stored, 1 in flight, reads: 1", "1 stored, 0 in flight, reads: 1", "1 stored, 0 in flight, reads: 2",
	})
	_, published, _ := parked(t, db)
	equal(t, "published", published, 1)
}

func count(all []string, wanted string) (n int) {
	for _, text := range all {
		if text == wanted {
			n++
		}
	}
	return n
}
