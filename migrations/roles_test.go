package migrations_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const (
	insertOne  = `INSERT INTO outbox_message (id, type, key, payload) VALUES (outbox_uuidv7(), 't.T', 'k', '')`
	insertCall = `SELECT outbox_insert('t.T', 'k', '')`
	insertMany = `SELECT outbox_insert(ARRAY[outbox_uuidv7()], '{t.T}', '{k}', '{x}', '{"{}"}')`

	insertDirectly = `INSERT INTO outbox (shard, message_id, type, payload) VALUES (0, outbox_uuidv7(), 't.T', '')`
)

// denied lists, for each role, statements that Postgres must refuse. The other tests that run as a role try everything
// that the role needs.
var denied = map[string][]string{
	"shop_api": {
		// Bypass the key locks, or read messages of others.
		insertDirectly, `SELECT FROM outbox`, `UPDATE outbox SET payload = ''`, `DELETE FROM outbox`, `TRUNCATE outbox`,
		`SELECT FROM outbox_slot_0`, `SELECT FROM outbox_message`, `UPDATE outbox_message SET payload = ''`,
		`DELETE FROM outbox_message`,
		`SELECT FROM outbox_cursor`, `UPDATE outbox_cursor SET delivered = pg_current_snapshot()`,
		`SELECT FROM outbox_scheduled`, `SELECT outbox_sweep('0')`, `SELECT outbox_move_due(1)`,
		`SELECT outbox_set_shards(2)`, `SELECT outbox_repair()`, `SELECT FROM inbox`,
		`INSERT INTO inbox (slot, consumer, message_id) VALUES (-1, 'c', outbox_uuidv7())`, `DELETE FROM inbox`,
		`SELECT FROM inbox_retry`, `SELECT inbox_sweep('0')`, `SELECT FROM dead_letter`,
		`SELECT FROM dead_letter_audit`,
		// Forget a response.
		`UPDATE idempotency_key SET request_hash = ''`, `DELETE FROM idempotency_key`,
	},
	"shop_relay": {
		// The relay publishes messages, but must not create or change any.
		insertOne, insertCall, insertMany, insertDirectly,
		`UPDATE outbox SET payload = ''`, `DELETE FROM outbox`, `TRUNCATE outbox`,
		`INSERT INTO outbox_cursor (shard) VALUES (1)`, `DELETE FROM outbox_cursor`,
		`SELECT outbox_schedule('{}', '{}', '{}', '{}', '{}', now(), false)`,
		`SELECT outbox_unschedule(outbox_uuidv7())`,
		`SELECT outbox_set_shards(2)`, `SELECT outbox_repair()`, `SELECT FROM inbox`, `SELECT FROM inbox_retry`,
		`SELECT inbox_sweep('0')`, `SELECT payload FROM dead_letter`, `UPDATE dead_letter SET resolution = 'discarded'`,
		`DELETE FROM dead_letter`, `SELECT FROM dead_letter_audit`,
		`SELECT FROM idempotency_key`, `SELECT idempotency_key_sweep('0')`,
	},
	"shop_consumer": {
		`SELECT FROM outbox`, insertDirectly, `UPDATE outbox SET payload = ''`,
		`DELETE FROM outbox`, `TRUNCATE outbox`, `SELECT FROM outbox_cursor`, `SELECT outbox_measure('1s')`,
		`SELECT outbox_sweep('0')`, `SELECT outbox_move_due(1)`, `SELECT outbox_set_shards(2)`,
		`SELECT outbox_repair()`,
		// Forgetting a message would apply it again.
		`DELETE FROM inbox`, `TRUNCATE inbox`, `TRUNCATE inbox_slot_0`,
		`UPDATE dead_letter SET resolution = 'discarded'`, `DELETE FROM dead_letter`, `SELECT FROM dead_letter_audit`,
		`INSERT INTO dead_letter_audit (letter_id, resolution, reason, actor) VALUES (1, 'discarded', 'r', 'a')`,
		`SELECT FROM idempotency_key`, `SELECT idempotency_key_sweep('0')`,
		`DELETE FROM inbox_pause`, `INSERT INTO inbox_pause (consumer, actor, reason) VALUES ('c', 'a', 'r')`,
		`SELECT FROM operator_audit`,
		`SELECT inbox_bury('c', 'k', true, '')`,
	},
	"shop_operator": {
		insertDirectly, `UPDATE outbox SET payload = ''`, `DELETE FROM outbox`,
		`UPDATE outbox_cursor SET delivered = pg_current_snapshot()`, `DELETE FROM inbox`,
		`UPDATE inbox SET copies = 1`,
		`DELETE FROM inbox_retry`,
		// Dead letters and audit records must not change.
		`UPDATE dead_letter SET payload = ''`, `DELETE FROM dead_letter`, `TRUNCATE dead_letter CASCADE`,
		`UPDATE dead_letter_audit SET actor = 'another'`, `DELETE FROM dead_letter_audit`,
		`UPDATE operator_audit SET actor = 'another'`, `DELETE FROM operator_audit`,
		`UPDATE inbox_consumer SET applied = 0`,
		`INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
			VALUES ('', '', '', '', '', '{}', '', '', 1)`,
		`SELECT FROM idempotency_key`,
	},
}

// deniedToAll lists statements that Postgres must refuse to every role.
var deniedToAll = []string{
	`CREATE TABLE mine ()`, `DROP TABLE outbox`, `ALTER TABLE outbox DISABLE TRIGGER ALL`,
	`ALTER TABLE dead_letter DISABLE TRIGGER dead_letter_guard_rows`,
	`CREATE OR REPLACE FUNCTION outbox_shard(key text, message_id uuid) RETURNS smallint
		LANGUAGE sql RETURN 1::smallint`,
	`CREATE ROLE mine`, `GRANT shop_relay TO shop_api`, `SET ROLE postgres`,
	`UPDATE goose_core_version SET is_applied = false`, `UPDATE goose_db_version SET is_applied = false`,
	`COPY (SELECT 1) TO PROGRAM 'true'`,
}

func TestWhatRolesMayNotDo(t *testing.T) {
	t.Parallel()
	url := testenv.PostgresURL(t)
	for role, statements := range denied {
		t.Run(role, func(t *testing.T) {
			t.Parallel()
			conn := as(t, url, role)
			for _, sql := range append(statements, deniedToAll...) {
				_, err := conn.Exec(t.Context(), sql)
				var refused *pgconn.PgError
				if !errors.As(err, &refused) || refused.Code != "42501" {
					t.Errorf("%s: %v", sql, err)
				}
			}
		})
	}
}

// The roles have no special attributes, and the defaults of Postgres grant nothing to PUBLIC.
func TestRolesAreNarrow(t *testing.T) {
	t.Parallel()
	url := testenv.PostgresURL(t)
	conn := as(t, url, "shop_operator")
	var wrong []string
	err := conn.QueryRow(t.Context(), `
		SELECT coalesce(array_agg(found), '{}') FROM (
			SELECT 'role ' || rolname FROM pg_roles
			WHERE rolname LIKE 'shop\_%' AND (rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication
				OR rolbypassrls)
			UNION ALL
			SELECT 'function ' || oid::regprocedure FROM pg_proc
			WHERE pronamespace = 'public'::regnamespace AND prosecdef
				AND has_function_privilege('public', oid, 'EXECUTE')
			UNION ALL
			SELECT 'function without a search_path: ' || oid::regprocedure FROM pg_proc
			WHERE pronamespace = 'public'::regnamespace AND prosecdef
				AND NOT coalesce(proconfig::text ~ 'search_path=public, pg_temp', false)
			UNION ALL
			SELECT 'table ' || oid::regclass FROM pg_class
			WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v')
				AND has_table_privilege('public', oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE')
		) AS all_found (found)`).Scan(&wrong)
	if err != nil || len(wrong) > 0 {
		t.Errorf("too many privileges: %s (%v)", strings.Join(wrong, ", "), err)
	}
}

// outbox_message and the outbox_insert for one message do not set a search_path. They must not run functions that the
// caller's search_path finds first.
func TestTheCallersSearchPathDecidesNothing(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	_, err := db.Exec(t.Context(), `
		CREATE SCHEMA trap;
		CREATE TABLE trap.stolen ();
		CREATE TABLE trap.outbox (LIKE public.outbox);
		CREATE FUNCTION trap.spring(text, text) RETURNS boolean
			LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$;
		CREATE FUNCTION trap.hashtext(text) RETURNS integer
			LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$;
		CREATE FUNCTION trap.outbox_shard(text, uuid) RETURNS smallint
			LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$;
		CREATE FUNCTION trap.outbox_headers_valid(jsonb) RETURNS boolean
			LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$;
		CREATE FUNCTION trap.jsonb_typeof(jsonb) RETURNS text
			LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$;
		CREATE FUNCTION trap.pg_advisory_xact_lock(integer, integer) RETURNS void
			LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$;
		CREATE OPERATOR trap.= (LEFTARG = text, RIGHTARG = text, FUNCTION = trap.spring);
		CREATE TABLE trap.outbox_message (LIKE public.outbox);
		CREATE OPERATOR trap.<> (LEFTARG = text, RIGHTARG = text, FUNCTION = trap.spring);
		CREATE OPERATOR trap.~ (LEFTARG = text, RIGHTARG = text, FUNCTION = trap.spring);
		GRANT USAGE ON SCHEMA trap TO shop_api`)
	if err != nil {
		t.Fatal(err)
	}
	conn := as(t, db.Config().ConnString(), "shop_api")
	if _, err := conn.Exec(t.Context(), `SET search_path = trap, pg_catalog, public`); err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{
		`INSERT INTO public.outbox_message (id, type, key, payload, headers)
			VALUES (public.outbox_uuidv7(), 't.T', 'k', '', '{"a": "b"}')`,
		`SELECT public.outbox_insert('t.T', 'k', '', '{"a": "b"}')`,
		`SELECT public.outbox_insert(ARRAY[public.outbox_uuidv7()], '{t.T}', '{k}', '{x}', ARRAY['{"a": "b"}'::jsonb])`,
	} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Errorf("%s: %v", sql, err)
		}
	}
	var rows int
	if err := db.QueryRow(t.Context(), `SELECT count(*) FROM public.outbox`).Scan(&rows); err != nil || rows != 3 {
		t.Errorf("%d rows, %v", rows, err)
	}
}

func as(t *testing.T, url, role string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), testenv.As(t, url, role))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	return conn
}
