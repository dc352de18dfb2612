package postgres

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/session"
	"github.com/jackc/pgx/v5"
)

// pinned lists, for each setting, a database default under which the core would break its guarantees, and the value
// that sessions must have.
var pinned = map[string]struct{ hostile, want string }{
	"default_transaction_isolation":       {"'repeatable read'", "read committed"},
	"client_encoding":                     {"LATIN1", "UTF8"},
	"search_path":                         {"elsewhere, public", "public"},
	"client_min_messages":                 {"error", "warning"},
	"lock_timeout":                        {"'7 s'", "5000"},
	"idle_in_transaction_session_timeout": {"'7 s'", "60000"},
	"statement_timeout":                   {"'7 s'", "0"},
	"plan_cache_mode":                     {"force_generic_plan", "auto"},
}

// A session has the settings that the core relies on, regardless of the database's defaults. So does a transaction
// through a pooler, which has no sessions.
func TestSessionsAreOurs(t *testing.T) {
	t.Parallel()
	for _, setting := range session.Pinned {
		if pinned[setting.Name].hostile == "" {
			t.Errorf("no hostile value for %s", setting.Name)
		}
	}
	url := testenv.PostgresURL(t)
	db := open(t, Config{URL: url})
	exec(t, db, `CREATE SCHEMA elsewhere`)
	var name string
	if err := db.QueryRow(t.Context(), `SELECT current_database()`).Scan(&name); err != nil {
		t.Fatal(err)
	}
	for setting, value := range pinned {
		exec(t, db, fmt.Sprintf(`ALTER DATABASE %s SET %s = %s`,
			pgx.Identifier{name}.Sanitize(), setting, value.hostile))
	}
	pooler := testenv.PgBouncer(t, url) // its connections have the database's defaults
	const sql = `SELECT name, setting FROM pg_settings WHERE name = ANY ($1)
		UNION ALL SELECT 'isolation', current_setting('transaction_isolation')`
	read := func(tx pgx.Tx) (map[string]string, error) {
		rows, err := tx.Query(t.Context(), sql, slices.Collect(maps.Keys(pinned)))
		if err != nil {
			return nil, err
		}
		got := map[string]string{}
		var setting, value string
		_, err = pgx.ForEachRow(rows, []any{&setting, &value}, func() error { got[setting] = value; return nil })
		return got, err
	}
	for how, url := range map[string]string{"directly": url, "through a pooler": pooler} {
		pool := open(t, Config{URL: url})
		err := Transact(t.Context(), pool, func(tx pgx.Tx) error {
			got, err := read(tx)
			wantPinned(t, how, got, how == "through a pooler")
			return err
		})
		if err != nil {
			t.Errorf("%s: %v", how, err)
		}
		var level, foreign string
		const rowSQL = `SELECT current_setting('transaction_isolation'), $1::text`
		err = TransactRow(t.Context(), pool, rowSQL, []any{"日本"}, &level, &foreign)
		if err != nil || level != "read committed" || foreign != "日本" {
			t.Errorf("%s, a single statement: %q, %q, %v", how, level, foreign, err)
		}
	}
	conn, err := session.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	err = pgx.BeginFunc(t.Context(), conn, func(tx pgx.Tx) error {
		got, err := read(tx)
		wantPinned(t, "session.Connect", got, false)
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func wantPinned(t *testing.T, how string, got map[string]string, pooled bool) {
	t.Helper()
	for name, value := range pinned {
		if name == "default_transaction_isolation" && pooled {
			continue // BEGIN sets it
		}
		if got[name] != value.want {
			t.Errorf("%s: %s is %q, want %q", how, name, got[name], value.want)
		}
	}
	if got["isolation"] != "read committed" {
		t.Errorf("%s: the isolation level is %q", how, got["isolation"])
	}
}
