package outbox

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
)

func TestCursor(t *testing.T) {
	t.Parallel()

	t.Run("IsLeasedToOne", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		held, _, err := acquire(t.Context(), db, 0, "a", time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := acquire(t.Context(), db, 0, "b", time.Hour); !errors.Is(err, errNotLeased) {
			t.Fatalf("error is %v", err)
		}
		if err := held.release(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, _, err := acquire(t.Context(), db, 0, "b", time.Hour); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("OfAZombieMovesNothing", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		zombie, at, err := acquire(t.Context(), db, 0, "zombie", time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		var next *cursor
		testenv.Eventually(t, 5*time.Second, func() error {
			next, _, err = acquire(t.Context(), db, 0, "next", time.Hour)
			return err
		})
		moved := progress{delivered: position{base: "900:900:"}, published: 1, parked: []deadletter.Letter{{MessageID: "x"}}}
		if err := zombie.move(t.Context(), moved); !errors.Is(err, errFenced) {
			t.Fatalf("move: %v", err)
		}
		if err := zombie.renew(t.Context(), time.Hour); !errors.Is(err, errFenced) {
			t.Fatalf("renew: %v", err)
		}
		if err := zombie.release(t.Context()); err != nil {
			t.Fatal(err)
		}
		letters, published, inCursor := parked(t, db)
		equal(t, "letters, published, parked", []int{len(letters), published, inCursor}, []int{0, 0, 0})
		if err := next.move(t.Context(), progress{delivered: at}); err != nil {
			t.Fatalf("the new holder's move: %v", err)
		}
	})

	t.Run("IsFencedWhenItsRowIsNotAsItWasLeft", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		held, at, err := acquire(t.Context(), db, 0, "a", time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if err := held.move(t.Context(), progress{delivered: at}); err != nil {
			t.Fatal(err)
		}
		exec(t, db, `UPDATE outbox_cursor SET moves = moves - 1`) // a standby without the last move was promoted
		if err := held.move(t.Context(), progress{delivered: at}); !errors.Is(err, errFenced) {
			t.Errorf("a row that lost a move: %v", err)
		}
		exec(t, db, `UPDATE outbox_cursor SET moves = moves + 1`)
		held.timeline = "0000FFFF" // the standby had all moves
		if err := held.move(t.Context(), progress{delivered: at}); !errors.Is(err, errFenced) {
			t.Errorf("move on another timeline: %v", err)
		}
		if err := held.renew(t.Context(), time.Hour); !errors.Is(err, errFenced) {
			t.Errorf("renew on another timeline: %v", err)
		}
	})

	// The statement that reads the rows also claims them and records progress, but only if they fit into one page and the
	// cursor's row is as this relay left it.
	t.Run("ClaimsWhatItReads", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		held, at, err := acquire(t.Context(), db, 0, "a", time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		log := &eventLog{db: db, maxRows: 2, maxBytes: 4 << 20}
		next := func(published int, wantRows int, wantClaim bool) {
			t.Helper()
			const sql = `SELECT moves, published, coalesce(claimed::text, ''), delivered::text FROM outbox_cursor`
			var moves, nowMoves, total, nowTotal int64
			var claimed, delivered string
			if err := db.QueryRow(t.Context(), sql).Scan(&moves, &total, &claimed, &delivered); err != nil {
				t.Fatal(err)
			}
			recorded := progress{delivered: at, published: published}
			found, _, moved, err := log.nextAndMove(t.Context(), at, claim{held, recorded})
			if moved != nil {
				held.moved(*moved)
			}
			if err != nil || found == nil && wantRows > 0 || found != nil && len(found.rows) != wantRows {
				t.Fatalf("found %v, %v, want %d rows", found, err, wantRows)
			}
			if err := db.QueryRow(t.Context(), sql).Scan(&nowMoves, &nowTotal, &claimed, &delivered); err != nil {
				t.Fatal(err)
			}
			switch {
			case !wantClaim:
				if found != nil && found.claimed || nowMoves != moves || nowTotal != total {
					t.Errorf("claimed, %d moves", nowMoves-moves)
				}
			case !found.claimed || nowMoves != moves+1 || held.moves != nowMoves ||
				nowTotal != total+int64(published) || claimed != found.snapshot || delivered != at.base:
				t.Errorf("claimed %v as %s of %s, %d moves, %d published",
					found.claimed, claimed, found.snapshot, nowMoves-moves, nowTotal-total)
			default:
				at = found.end
			}
		}
		next(0, 0, false) // the log is empty
		insert(t, db, "", "m000")
		next(0, 1, true)
		insert(t, db, "", "m001")
		next(1, 1, true)
		exec(t, db, `UPDATE outbox_cursor SET lease_expires_at = lease_expires_at`) // gives the row a new ctid
		insert(t, db, "", "m002")
		next(1, 1, false)
		if err := held.move(t.Context(), progress{delivered: at}); err != nil { // finds the row by key
			t.Fatal(err)
		}
		next(0, 1, true)
		fillProbes(t, db, 3)
		next(0, 2, false) // the first page of a batch
		exec(t, db, `UPDATE outbox_cursor SET epoch = epoch + 1`)
		if err := db.QueryRow(t.Context(), `SELECT ctid FROM outbox_cursor`).Scan(&held.row.tid); err != nil {
			t.Fatal(err)
		}
		log.maxRows = 10
		next(0, 3, false) // fenced
	})

	// A claim waits for the disk. Other records do not, and they leave the connection's setting unchanged.
	t.Run("WaitsForTheDiskOnlyWhenItClaims", func(t *testing.T) {
		t.Parallel()
		config := testenv.Postgres(t).Config()
		config.ConnConfig.RuntimeParams["synchronous_commit"], config.MaxConns = "local", 1
		db, err := pgxpool.NewWithConfig(t.Context(), config)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(db.Close)
		exec(t, db, `CREATE TABLE seen (how text)`)
		exec(t, db, `CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			INSERT INTO seen VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$`)
		exec(t, db, `CREATE CONSTRAINT TRIGGER see AFTER UPDATE ON outbox_cursor DEFERRABLE INITIALLY DEFERRED
			FOR EACH ROW EXECUTE FUNCTION see()`)
		held, at, err := acquire(t.Context(), db, 0, "a", time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		letters := []deadletter.Letter{{Reason: deadletter.Unroutable, Payload: []byte{}}}
		for _, p := range []progress{
			{delivered: at}, {delivered: at, claimed: "1:1:"}, {delivered: at},
			{delivered: at, parked: letters}, {delivered: at, claimed: "1:1:", parked: letters},
		} {
			if err := held.move(t.Context(), p); err != nil {
				t.Fatal(err)
			}
		}
		rows, err := db.Query(t.Context(),
			`SELECT how FROM seen UNION ALL SELECT 'now ' || current_setting('synchronous_commit')`)
		if err != nil {
			t.Fatal(err)
		}
		seen, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "synchronous_commit", seen, []string{"local", "off", "local", "off", "off", "local", "now local"})
	})

	t.Run("IsReadAnewAfterAFailover", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		insert(t, db, "", "m000")
		b := newBroker(1)
		start(t, db, b, Config{PollInterval: 10 * time.Millisecond})
		await(t, "m000", b.complete)
		testenv.Eventually(t, 10*time.Second, func() error {
			if _, published, _ := parked(t, db); published != 1 {
				return errors.New("not recorded")
			}
			return nil
		})
		// The promoted standby has no record of the delivery, and the pool's connections silently reach it.
		exec(t, db, `UPDATE outbox_cursor
			SET delivered = '1:1:', batch = NULL, last_id = 0, published = 0, moves = moves - 1`)
		insert(t, db, "", "m001")
		testenv.Eventually(t, 10*time.Second, func() error {
			b.mu.Lock()
			defer b.mu.Unlock()
			if count(b.stored, "m000") != 2 || count(b.stored, "m001") != 1 {
				return fmt.Errorf("stored %v, want also the messages that this cursor calls undelivered", b.stored)
			}
			return nil
		})
	})

	t.Run("IsGivenUpWhenTheDatabaseSaysNothing", func(t *testing.T) {
		t.Parallel()
		proxy, url := testenv.ProxyURL(t, testenv.PostgresURL(t))
		db, err := postgres.Open(t.Context(), postgres.Config{URL: url})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(db.Close)
		b := newBroker(1)
		start(t, db, b, Config{Lease: 200 * time.Millisecond, PollInterval: 10 * time.Millisecond})
		insert(t, db, "", "m000")
		await(t, "m000", b.complete)
		proxy.Freeze(true) // queries in progress never get an answer
		b.mu.Lock()
		closed := b.closed
		b.mu.Unlock()
		testenv.Eventually(t, 20*time.Second, func() error {
			b.mu.Lock()
			defer b.mu.Unlock()
			if b.closed == closed {
				return errors.New("the run still waits")
			}
			return nil
		})
		proxy.Freeze(false)
	})

	t.Run("IsFoundAlsoWhereItIsNotExpected", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		held, at, err := acquire(t.Context(), db, 0, "a", time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		for _, hint := range []pgtype.TID{{}, {BlockNumber: 77, OffsetNumber: 1, Valid: true}} {
			held.row.tid = hint
			if err := held.move(t.Context(), progress{delivered: at, published: 1}); err != nil {
				t.Fatalf("hint %v: %v", hint, err)
			}
		}
		_, published, _ := parked(t, db)
		equal(t, "published", published, 2)
	})

	t.Run("OfAnotherClusterIsRefused", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		exec(t, db, `UPDATE outbox_cursor SET system_identifier = 1`) // as after a restore
		err := NewRelay(db, func() messaging.Publisher { return newBroker(0) }, Config{}).Run(t.Context())
		if !errors.Is(err, ErrForeignCluster) {
			t.Fatalf("error is %v", err)
		}
	})

	t.Run("IsTakenOverWhenItsHolderIsSilent", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		insert(t, db, "", "m000")
		if _, _, err := acquire(t.Context(), db, 0, "killed", time.Second); err != nil {
			t.Fatal(err)
		}
		b := newBroker(1)
		started := time.Now()
		start(t, db, b, Config{Lease: time.Second})
		await(t, "take-over", b.complete)
		if took := time.Since(started); took > 10*time.Second { // far above twice the lease
			t.Errorf("took %s", took)
		}
	})
}
