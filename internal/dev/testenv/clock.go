//go:build unix

package testenv

import (
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// ShiftClock shifts a database's clock against this machine's. Statements and PL/pgSQL functions that are prepared from
// now on see a later clock_timestamp(), or an earlier one if by is negative. Column defaults and functions in plain SQL
// keep the true time, because they are bound to the old function.
func ShiftClock(t testing.TB, db *pgxpool.Pool, by time.Duration) {
	t.Helper()
	_, err := db.Exec(t.Context(), fmt.Sprintf(`
		ALTER FUNCTION pg_catalog.clock_timestamp() RENAME TO true_clock_timestamp;
		CREATE FUNCTION pg_catalog.clock_timestamp() RETURNS timestamptz LANGUAGE sql
			RETURN true_clock_timestamp() + interval '%d ms'`, by.Milliseconds()))
	if err != nil {
		t.Fatal(err)
	}
}
