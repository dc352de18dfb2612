package postgres

import (
	"fmt"
	"testing"

	"example.com/orders/internal/session"
	"example.com/orders/internal/testenv"
	"github.com/jackc/pgx/v5"
)

// hostile are settings of a database under which the core would break its promises.
var hostile = map[string]string{
	"default_transaction_isolation": "'repeatable read'", "client_encoding": "LATIN1", "search_path": "elsewhere, public",
	"client_min_messages": "error", "lock_timeout": "1", "idle_in_transaction_session_timeout": "1", "statement_timeout": "1",
	"plan_cache_mode": "force_generic_plan",
}

// A session has the settings that the core relies on, whatever the database says: also in a transaction through a
// pooler, which has no sessions.
func TestSessionsAreOurs(t *testing.T) {
	t.Parallel()
	url := testenv.PostgresURL(t)
	db := open(t, Config{URL: url})
	pooler := testenv.PgBouncer(t, url)
	exec(t, db, `CREATE SCHEMA elsewhere`)
	for _, one := range session.Pinned {
		if hostile[one.Name] == "" {
			t.Errorf("no hostile value for %s", one.Name)
		}
	}
	var name string
	if err := db.QueryRow(t.Context(), `SELECT current_database()`).Scan(&name); err != nil {
		t.Fatal(err)
	}
	for setting, value := range hostile {
		exec(t, db, fmt.Sprintf(`ALTER DATABASE %s SET %s = %s`, pgx.Identifier{name}.Sanitize(), setting, value))
	}
	const sql = `SELECT name, setting FROM pg_settings WHERE name = ANY ($1)
		UNION ALL SELECT 'isolation', current_setting('transaction_isolation')`
	read := func(tx pgx.Tx) (map[string]string, error) {
		rows, err := tx.Query(t.Context(), sql, settingNames())
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
		var level string
		err = TransactRow(t.Context(), pool, `SELECT current_setting('transaction_isolation')`, nil, &level)
		if err != nil || level != "read committed" {
			t.Errorf("%s, a statement by itself: %q, %v", how, level, err)
		}
	}
	conn, err := Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	err = pgx.BeginFunc(t.Context(), conn, func(tx pgx.Tx) error {
		got, err := read(tx)
		wantPinned(t, "by itself", got, false)
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func settingNames() (names []string) {
	for _, one := range session.Pinned {
		names = append(names, one.Name)
	}
	return names
}

func wantPinned(t *testing.T, how string, got map[string]string, pooled bool) {
	t.Helper()
	for _, one := range session.Pinned {
		if one.Name == "default_transaction_isolation" && pooled {
			continue // BEGIN says it
		}
		if got[one.Name] != one.Value {
			t.Errorf("%s: %s is %q, want %q", how, one.Name, got[one.Name], one.Value)
		}
	}
	if got["isolation"] != "read committed" {
		t.Errorf("%s: the isolation level is %q", how, got["isolation"])
	}
}
