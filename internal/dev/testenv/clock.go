//go:build unix

package testenv

import (
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// ShiftClock makes a database's clock differ from this machine's: statements and PL/pgSQL functions that are prepared
// from now on see clock_timestamp() so much later, or earlier if by is negative. Column defaults and functions in plain
// SQL, which are bound to the old one, keep the true time.
func ShiftClock(t testing.TB, db *pgxpool.Pool, by time.Duration) {
	t.Helper()
	_, err := db.Exec(t.Context(), fmt.Sprintf(`
		ALTER FUNCTION pg_catalog.clock_timestamp() RENAME TO true_clock_timestamp;
		CREATE FUNCTION pg_catalog.clock_timestamp() RETURNS timestamptz LANGUAGE sql RETURN true_clock_timestamp() + interval '%d ms'`, by.Milliseconds()))
	if err != nil {
		t.Fatal(err)
	}
}
