package migrations_test

import (
	"errors"
	"strings"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// exempt are the functions that take locks and do not depend on data committed while they waited, with the reasons.
var exempt = map[string]string{
	"outbox_insert": "locks keys and inserts; it does not read rows of other transactions",
}

// A function that waits for a lock and then looks again must see what was committed meanwhile. The test finds such
// functions by their source, so it covers new ones as well.
func TestFunctionsThatLockNeedReadCommitted(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	rows, _ := db.Query(t.Context(), `
		SELECT proname, prosrc ~ 'needs_read_committed\(\)' FROM pg_proc JOIN pg_language ON pg_language.oid = prolang
		WHERE pronamespace = 'public'::regnamespace AND lanname IN ('plpgsql', 'sql')
			AND coalesce(pg_get_function_sqlbody(pg_proc.oid), prosrc) ~*
				'\mLOCK TABLE\M|\mFOR (NO KEY )?UPDATE\M|\mFOR (KEY )?SHARE\M|advisory_(xact_)?lock'`)
	found := 0
	var name string
	var guarded bool
	_, err := pgx.ForEachRow(rows, []any{&name, &guarded}, func() error {
		if _, exempted := exempt[name]; guarded == exempted {
			t.Errorf("%s locks: calls needs_read_committed %t, exempt %t", name, guarded, exempted)
		}
		found++
		return nil
	})
	if err != nil || found < 9 {
		t.Errorf("%d functions found, %v", found, err)
	}
}

// locking are calls of functions that lock. The test of a feature adds its own.
var locking = []string{
	`outbox_set_shards(2)`, `outbox_sweep('1 h')`, `outbox_measure('1 s')`, `outbox_move_due(1)`,
	`outbox_repair()`, `inbox_sweep('1 h')`, `inbox_bury('c', 'k', true, '')`,
	`idempotency_key_sweep('1 h')`,
}

func TestOtherIsolationLevelsAreRefused(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	for _, call := range locking {
		for _, level := range []pgx.TxIsoLevel{pgx.RepeatableRead, pgx.Serializable} {
			err := pgx.BeginTxFunc(t.Context(), db, pgx.TxOptions{IsoLevel: level}, func(tx pgx.Tx) error {
				_, err := tx.Exec(t.Context(), `SELECT `+call)
				return err
			})
			var refused *pgconn.PgError
			if !errors.As(err, &refused) || refused.Code != "25000" ||
				!strings.Contains(strings.ToLower(refused.Message), string(level)) {
				t.Errorf("%s under %s: %v", call, level, err)
			}
		}
		if _, err := db.Exec(t.Context(), `SELECT `+call); err != nil && !strings.HasPrefix(call, "outbox_set_shards") {
			t.Errorf("%s: %v", call, err)
		}
	}
}
