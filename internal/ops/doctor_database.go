package ops

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"example.com/shop/internal/inbox"
	"example.com/shop/internal/outbox"
	"example.com/shop/migrations"
	"github.com/jackc/pgx/v5"
)

func checkDatabase(ctx context.Context, target Target) (Finding, error) {
	var version string
	var number int
	var standby bool
	err := target.DB.QueryRow(ctx, `
		SELECT current_setting('server_version'), current_setting('server_version_num')::integer, pg_is_in_recovery()`).
		Scan(&version, &number, &standby)
	switch {
	case err != nil:
		return Finding{}, err
	case standby:
		return Finding{
			Verdict: Wrong, Detail: "this is a standby, which accepts no writes",
			Cure:  "Add target_session_attrs=read-write and all hosts to POSTGRES_URL.",
			cause: cause{blocksAll: true},
		}, nil
	case number < oldestPostgres*10_000:
		return Finding{
			Verdict: Wrong, Detail: "PostgreSQL " + version,
			Cure:  fmt.Sprintf("Use PostgreSQL %d or newer.", oldestPostgres),
			cause: cause{blocksAll: true},
		}, nil
	}
	return Finding{Detail: "PostgreSQL " + version}, nil
}

// oldestPostgres is the oldest major version that the schema works with.
const oldestPostgres = 15

func checkSchema(ctx context.Context, target Target) (Finding, error) {
	err := migrations.Check(ctx, target.DB)
	refusal := new(migrations.Refusal)
	switch {
	case err == nil:
		return Finding{Detail: "up to date"}, nil
	case !errors.As(err, &refusal):
		return Finding{}, err
	}
	finding := Finding{Verdict: Wrong, Detail: refusal.Problem(), cause: cause{kind: noSchema}}
	switch refusal.Reason {
	case migrations.ErrNoSchema:
		finding.cause.blocksAll = true
		finding.Cure = "Run the command migrate, if POSTGRES_URL names the right database."
	case migrations.ErrTooOld: // the cure of the check
	default:
		finding.Cure = strings.ToUpper(refusal.Cure[:1]) + refusal.Cure[1:] + "."
	}
	return finding, nil
}

// queryTexts runs a query that describes each problem in a row of text.
func queryTexts(ctx context.Context, target Target, sql string, args ...any) ([]string, error) {
	rows, err := target.DB.Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// listFinding returns the finding of a check that lists problems. If there are none, its detail is otherwise.
func listFinding(found []string, err error, verdict Verdict, otherwise string) (Finding, error) {
	if err != nil || len(found) == 0 {
		return Finding{Detail: otherwise}, err
	}
	return Finding{Verdict: verdict, Detail: strings.Join(found, "; ")}, nil
}

// grantsSQL finds missing grants on this project's own tables and functions, as the migrations make them. Grants of the
// domain are not checked.
const grantsSQL = `
SELECT format('%s may not %s %s', role, lower(privilege), object) FROM (VALUES
    ('shop_api', 'outbox_message', '{INSERT}'), ('shop_consumer', 'outbox_message', '{INSERT}'),
    ('shop_operator', 'outbox_message', '{INSERT}'),
    ('shop_relay', 'outbox', '{SELECT}'), ('shop_relay', 'outbox_cursor', '{SELECT,UPDATE}'),
    ('shop_relay', 'outbox_relay', '{SELECT,INSERT,UPDATE,DELETE}'), ('shop_relay', 'dead_letter', '{INSERT}'),
    ('shop_consumer', 'inbox', '{SELECT,INSERT,UPDATE}'),
    ('shop_consumer', 'inbox_retry', '{SELECT,INSERT,UPDATE,DELETE}'),
    ('shop_consumer', 'dead_letter', '{SELECT,INSERT}'),
    ('shop_operator', 'outbox', '{SELECT}'), ('shop_operator', 'outbox_cursor', '{SELECT}'),
    ('shop_operator', 'outbox_backlog', '{SELECT}'),
    ('shop_consumer', 'inbox_consumer', '{SELECT,INSERT,UPDATE,DELETE}'), ('shop_consumer', 'inbox_pause', '{SELECT}'),
    ('shop_operator', 'inbox', '{SELECT,INSERT}'), ('shop_operator', 'inbox_retry', '{SELECT,INSERT}'),
    ('shop_operator', 'inbox_consumer', '{SELECT}'),
    ('shop_operator', 'inbox_pause', '{SELECT,INSERT,DELETE}'), ('shop_operator', 'operator_audit', '{SELECT,INSERT}'),
    ('shop_operator', 'dead_letter', '{SELECT}'), ('shop_operator', 'dead_letter_audit', '{SELECT,INSERT}')
) AS wanted (role, object, privileges), unnest(privileges::text[]) AS privilege
WHERE NOT has_table_privilege(role, object, privilege)
UNION ALL
SELECT 'shop_operator may not resolve dead_letter'
WHERE NOT has_column_privilege('shop_operator', 'dead_letter', 'resolution', 'UPDATE')
UNION ALL
SELECT format('%s may not call %s', role, oid::regprocedure) FROM (VALUES
    ('{shop_api,shop_consumer,shop_operator}', '{outbox_insert,outbox_schedule,outbox_unschedule}'),
    ('{shop_relay,shop_consumer,shop_operator}', '{sequences_behind,outbox_stray_shards}'),
    ('{shop_api,shop_relay,shop_operator}', '{outbox_measure}'), ('{shop_relay}', '{outbox_sweep,outbox_move_due}'),
    ('{shop_operator}', '{outbox_set_shards,outbox_repair,inbox_bury,operation_cancel}'),
    ('{shop_consumer}', '{inbox_sweep}')
) AS wanted (roles, functions), unnest(roles::text[]) AS role,
    unnest(functions::text[]) AS function JOIN pg_proc ON proname = function
WHERE pg_function_is_visible(oid) AND NOT has_function_privilege(role, oid, 'EXECUTE')`

func checkGrants(ctx context.Context, target Target) (Finding, error) {
	found, err := queryTexts(ctx, target, grantsSQL)
	return listFinding(found, err, Wrong, "roles have what they need")
}

const indexesSQL = `
SELECT 'missing: ' || wanted FROM unnest($1::text[]) AS wanted WHERE to_regclass(wanted) IS NULL
UNION ALL
SELECT 'invalid: ' || indexrelid::regclass FROM pg_index
WHERE NOT indisvalid AND indrelid::regclass::text ~ '^(outbox|inbox|dead_letter)'`

func checkIndexes(ctx context.Context, target Target) (Finding, error) {
	found, err := queryTexts(ctx, target, indexesSQL, []string{
		"outbox_pkey", "outbox_xid_idx", "outbox_created_at_idx", "outbox_cursor_pkey",
		"outbox_scheduled_pkey", "outbox_scheduled_due_idx", "outbox_scheduled_latest_idx",
		"inbox_pkey", "inbox_slot_foreign_received_at_idx", "inbox_retry_pkey", "inbox_retry_key_idx",
		"inbox_retry_due_idx", "inbox_retry_head_idx", "inbox_retry_message_id_idx",
		"dead_letter_pkey", "dead_letter_open_idx", "dead_letter_message_id_idx", "dead_letter_audit_letter_id_idx",
		"inbox_pause_pkey", "inbox_consumer_pkey", "operator_audit_pkey",
	})
	return listFinding(found, err, Wrong, "present and valid")
}

const durabilitySQL = `
SELECT 'synchronous_commit is ' || setting FROM pg_settings WHERE name = 'synchronous_commit' AND setting = 'off'
UNION ALL
SELECT 'fsync is off' FROM pg_settings WHERE name = 'fsync' AND setting = 'off'
UNION ALL
SELECT format('synchronous_commit is off for %s',
    CASE setrole WHEN 0 THEN 'the database' ELSE setrole::regrole::text END)
FROM pg_db_role_setting
WHERE 'synchronous_commit=off' = ANY (setconfig)
  AND setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
  AND (setrole IN (0, session_user::regrole) OR setrole::regrole::text LIKE 'shop\_%')`

func checkDurability(ctx context.Context, target Target) (Finding, error) {
	found, err := queryTexts(ctx, target, durabilitySQL)
	return listFinding(found, err, Wrong, "commits reach the disk")
}

func checkCluster(ctx context.Context, target Target) (Finding, error) {
	native, err := isNative(ctx, target.DB)
	if err == nil && !native {
		return Finding{Verdict: Wrong, Detail: outbox.ErrForeignCluster.Error()}, nil
	}
	return Finding{Detail: "the cursor belongs to this cluster"}, err
}

func checkRelay(ctx context.Context, target Target) (Finding, error) {
	shards, err := Shards(ctx, target.DB)
	if err != nil {
		return Finding{}, err
	}
	held, free := 0, []string{}
	for _, shard := range shards {
		switch {
		case shard.Drained:
		case shard.Owner == "":
			free = append(free, fmt.Sprintf("no relay holds shard %d", shard.Shard))
		default:
			held++
		}
	}
	return listFinding(free, nil, Wrong, fmt.Sprintf("%d %s held", held, plural(held, "shard is", "shards are")))
}

// maxLag is the age above which an undelivered message is wrong.
const maxLag = time.Minute

func checkBacklog(ctx context.Context, target Target) (Finding, error) {
	backlog, err := outbox.Measure(ctx, target.DB, 2*time.Second)
	if err != nil {
		return Finding{}, err
	}
	var messages int64
	var age time.Duration
	for _, shard := range backlog {
		messages, age = messages+shard.Messages, max(age, shard.Age)
	}
	finding := Finding{Detail: fmt.Sprintf("%d %s, the oldest %s old",
		messages, plural(int(messages), "message", "messages"), age.Round(time.Second))}
	if age > maxLag {
		finding.Verdict = Wrong
	}
	return finding, nil
}

func checkDoorbell(ctx context.Context, target Target) (Finding, error) {
	if target.ListenURL == "" {
		return Finding{Detail: "none: the relay polls"}, nil
	}
	took, err := tryDoorbell(ctx, target.PostgresURL, target.ListenURL)
	switch {
	case errors.Is(err, errNoRing):
		return Finding{Verdict: Wrong, Detail: err.Error()}, nil
	case err != nil && target.ListenURL != target.PostgresURL:
		return Finding{}, otherServer{"POSTGRES_LISTEN_URL", err}
	case err != nil:
		return Finding{}, err
	}
	return Finding{Detail: fmt.Sprintf("received after %s", took.Round(10*time.Microsecond))}, nil
}

func checkRetention(ctx context.Context, target Target) (Finding, error) {
	detail, err := CheckRetention(ctx, target.DB, target.LongestRedelivery)
	if errors.Is(err, ErrForgetful) {
		return Finding{Verdict: Wrong, Detail: err.Error()}, nil
	}
	return Finding{Detail: detail}, err
}

// maxHold is how long something may hold back vacuum, or block a key, before it deserves attention.
const maxHold = 10 * time.Minute

func checkVacuum(ctx context.Context, target Target) (Finding, error) {
	holders, err := holders(ctx, target.DB)
	if err != nil {
		return Finding{}, err
	}
	var old []string
	for _, h := range holders {
		if h.Seconds > maxHold.Seconds() || h.Kind == "slot" && h.Transactions > 10_000_000 {
			old = append(old, fmt.Sprintf("%s %s holds it back for %s and %d transactions",
				h.Kind, h.Name, time.Duration(h.Seconds)*time.Second, h.Transactions))
		}
	}
	return listFinding(old, nil, Attention, "nothing holds it back")
}

// maxBlocked is how many keys the doctor examines: those that have waited longest.
const maxBlocked = 1000

func checkRetries(ctx context.Context, target Target) (Finding, error) {
	blocked, err := inbox.Blocked(ctx, target.DB, maxBlocked)
	if err != nil {
		return Finding{}, err
	}
	var old []string
	for _, key := range blocked {
		if waited := time.Since(key.Since); waited > maxHold {
			old = append(old, fmt.Sprintf("key %q of %s has waited for %s", key.Key, key.Consumer, waited.Round(time.Minute)))
		}
	}
	return listFinding(old[:min(len(old), 5)], nil, Attention,
		fmt.Sprintf("%d %s for a retry", len(blocked), plural(len(blocked), "key waits", "keys wait")))
}
