package inbox

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/postgres"
	"example.com/shop/migrations"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// flaky is an Inbox whose connection can lose the answer to the next COMMIT, and can then fail until reconnect.
type flaky struct {
	*Inbox
	cut  atomic.Int32
	away atomic.Bool
}

func newFlaky(t *testing.T, b *bundle, config Config) *flaky {
	t.Helper()
	f := &flaky{}
	f.Inbox = New(openVia(t, b, func(ctx context.Context, network, address string) (net.Conn, error) {
		if f.away.Load() {
			return nil, errProbe
		}
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		return &commitCutter{Conn: conn, left: &f.cut}, err
	}), b.group, config)
	return f
}

// loseClaim makes the process claim a due message and lose the answer. With away, the connection then stays down.
func (f *flaky) loseClaim(t *testing.T, away bool) {
	t.Helper()
	if err := f.db.Ping(t.Context()); err != nil { // so that the pool has a connection
		t.Fatal(err)
	}
	f.cut.Store(1)
	f.away.Store(away)
	if _, err := f.RetryNext(t.Context()); !errors.Is(err, postgres.ErrOutcomeUnknown) {
		t.Errorf("got error %v, want one that wraps ErrOutcomeUnknown", err)
	}
}

func (f *flaky) reconnect() { f.away.Store(false) }

// A claim may be in effect although its process does not know that and runs no handler. Such a claim does not count as
// a crash of the message, however often it happens.
func TestARunThatDidNotStartIsNotCharged(t *testing.T) {
	t.Parallel()
	db := setup(t).db
	// begin makes a message that has failed once.
	begin := func(t *testing.T) *bundle {
		t.Helper()
		b := newBundle(db, t.Name())
		b.on("one", fails)
		process(t, b.inbox(eager), probe("k", "one"))
		return b
	}
	// end checks that no run is counted, and that the message can still be applied.
	end := func(t *testing.T, b *bundle, f *flaky) {
		t.Helper()
		b.wantWaiting(t, "one 1/1")
		ran := b.ran("one")
		b.on("one", nil)
		b.makeDue(t)
		retryAll(t, f.Inbox)
		b.wantEffects(t, "one")
		b.wantDead(t)
		if again := b.ran("one") - ran; again != 1 {
			t.Errorf("the handler ran %d times in the end, want once", again)
		}
	}

	t.Run("TheAnswerIsLost", func(t *testing.T) {
		t.Parallel()
		b := begin(t)
		f := newFlaky(t, b, eager)
		for range 2 * maxCrashes {
			f.loseClaim(t, false)
			b.wantWaiting(t, "one 1/1")
		}
		end(t, b, f)
	})

	t.Run("TheAnswerIsLostAndTheDatabaseStaysAway", func(t *testing.T) {
		t.Parallel()
		b := begin(t)
		f := newFlaky(t, b, eager)
		for range 2 * maxCrashes {
			f.loseClaim(t, true)
			b.wantWaiting(t, "one 1/2") // the process cannot undo the run yet
			_, err := f.RetryNext(t.Context())
			wantAway(t, err)
			f.reconnect()
			b.makeDue(t) // the claim expires
		}
		if err := f.undoRuns(t.Context()); err != nil {
			t.Error(err)
		}
		end(t, b, f)
	})

	t.Run("ManyProcessesAreCutOff", func(t *testing.T) {
		t.Parallel()
		b := begin(t)
		var all []*flaky
		for range maxCrashes {
			all = append(all, newFlaky(t, b, eager))
			all[len(all)-1].loseClaim(t, true)
			b.makeDue(t)
		}
		b.wantWaiting(t, "one 1/4")
		for _, f := range all { // each undoes its own run, the first one after others had the claim
			f.reconnect()
			if err := f.undoRuns(t.Context()); err != nil {
				t.Error(err)
			}
		}
		end(t, b, all[0])
	})

	t.Run("TheProcessStopsWhileTheHandlerRuns", func(t *testing.T) {
		t.Parallel()
		b := begin(t)
		f := newFlaky(t, b, eager)
		for range 2 * maxCrashes {
			ctx, cancel := context.WithCancel(t.Context())
			b.on("one", func(ctx context.Context, tx pgx.Tx) error {
				go func() {
					defer cancel()
					awaitEvent(t, b, "PgSleep")
				}()
				_, err := tx.Exec(ctx, `SELECT pg_sleep(60)`) // pgx closes the connection during this statement
				return err
			})
			if _, err := f.RetryNext(ctx); !errors.Is(err, context.Canceled) {
				t.Errorf("got error %v", err)
			}
			b.wantWaiting(t, "one 1/1")
		}
		end(t, b, f)
	})

	t.Run("TheProcessStops", func(t *testing.T) {
		t.Parallel()
		b := begin(t)
		f := newFlaky(t, b, eager)
		f.loseClaim(t, true)
		f.reconnect()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := f.Run(ctx); err != nil {
			t.Error(err)
		}
		end(t, b, f)
	})

	// The process gives up waiting for the answer to COMMIT before Postgres has committed, as in a network partition.
	t.Run("TheCommitIsStillInProgress", func(t *testing.T) {
		t.Parallel()
		b := begin(t)
		f := newFlaky(t, b, eager)
		r := retry{run: uuid.New()}
		tx, err := db.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		err = tx.QueryRow(t.Context(), claimSQL, b.group.name, time.Hour, r.run).
			Scan(&r.seq, &r.attempts, &r.unended, &r.ID, &r.Type, &r.Key, &r.Payload, &r.Headers)
		if err != nil {
			t.Fatal(err)
		}
		f.abort(t.Context(), r)
		if retryOne(t, f.Inbox) {
			t.Error("retried a message that is being claimed")
		}
		if err := tx.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
		b.wantWaiting(t, "one 1/2")
		if err := f.undoRuns(t.Context()); err != nil || len(f.aborted.all()) > 0 {
			t.Errorf("%d aborted runs are left, %v", len(f.aborted.all()), err)
		}
		end(t, b, f)
	})

	// Another process runs a handler on the row of the aborted run. Other messages must not wait for that.
	t.Run("AnotherProcessHasTheMessage", func(t *testing.T) {
		t.Parallel()
		b := begin(t)
		f := newFlaky(t, b, eager)
		f.loseClaim(t, true)
		f.reconnect()
		b.makeDue(t)
		b.on("one", func(ctx context.Context, _ pgx.Tx) error {
			b.on("other", fails)
			process(t, f.Inbox, probe("", "other"))
			b.on("other", nil)
			if !retryOne(t, f.Inbox) {
				t.Error("the other message was not found")
			}
			if left := len(f.aborted.all()); left != 1 {
				t.Errorf("%d aborted runs are left, want 1", left)
			}
			return errProbe
		})
		retryOne(t, b.inbox(eager))
		b.wantWaiting(t, "one 2/2")
		if err := f.undoRuns(t.Context()); err != nil || len(f.aborted.all()) > 0 {
			t.Errorf("%d aborted runs are left, %v", len(f.aborted.all()), err)
		}
	})
}

// awaitEvent waits until a session of the database waits for the event.
func awaitEvent(t *testing.T, b *bundle, event string) {
	testenv.Eventually(t, 10*time.Second, func() error {
		var waits bool
		const sql = `
			SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = $1)`
		err := b.db.QueryRow(t.Context(), sql, event).Scan(&waits)
		if err == nil && !waits {
			err = errors.New("no session waits for " + event)
		}
		return err
	})
}

// A standby that does not answer delays every COMMIT that waits for it. The claim does not wait for it, so the handler
// runs.
func TestAClaimDoesNotWaitForAStandby(t *testing.T) {
	t.Parallel()
	url, _ := testenv.Cluster(t)
	if _, err := migrations.Up(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	db, err := postgres.Open(t.Context(), postgres.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	b := setupOn(t, db)
	b.on("one", fails)
	process(t, b.inbox(eager), probe("k", "one"))
	wait := func(standbys string) {
		t.Helper()
		exec(t, b.db, `ALTER SYSTEM SET synchronous_standby_names = '`+standbys+`'`)
		exec(t, b.db, `SELECT pg_reload_conf()`)
	}
	// Commit until a commit waits, which shows that Postgres has applied the setting.
	ctx, stop := context.WithCancel(t.Context())
	var others sync.WaitGroup
	defer others.Wait()
	defer stop()
	wait("nobody")
	others.Go(func() {
		for ctx.Err() == nil {
			_, _ = b.db.Exec(ctx, `SELECT pg_logical_emit_message(true, '', '')`)
		}
	})
	awaitEvent(t, b, "SyncRep")
	b.on("one", func(context.Context, pgx.Tx) error { wait(""); return nil })
	retryOne(t, b.inbox(eager))
	b.wantEffects(t, "one")
}
