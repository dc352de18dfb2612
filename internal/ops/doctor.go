package ops

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"example.com/orders/internal/inbox"
	"example.com/orders/internal/outbox"
	"example.com/orders/internal/postgres"
	"example.com/orders/internal/rabbit"
	"example.com/orders/migrations"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
)

// Verdict is how a check ended.
type Verdict string

const (
	OK Verdict = "ok"
	// Attention: it works, and somebody should look.
	Attention Verdict = "attention"
	Wrong     Verdict = "wrong"
)

// Finding is a check with its verdict, and the cure if there is something to be cured.
type Finding struct {
	Check   string  `json:"check"`
	Verdict Verdict `json:"verdict"`
	Detail  string  `json:"detail"`
	Cure    string  `json:"cure,omitempty"`
}

// Patient is what the doctor looks at.
type Patient struct {
	DB *pgxpool.Pool
	// ListenURL is where the relay listens, "" if it polls; PostgresURL is where writers ring.
	PostgresURL, ListenURL string
	AMQPURL                string
	// ManagementURL is RabbitMQ's management API, "" if nothing is asked of it.
	ManagementURL string
	Topology      rabbit.Topology
	// LongestRedelivery is how long a message may be under way from its last publishing to its effect.
	LongestRedelivery time.Duration
}

// Doctor makes every check, one after the other; a check that cannot be made is a finding, too.
func Doctor(ctx context.Context, p Patient) []Finding {
	checks := []struct {
		name string
		run  func(context.Context, Patient) (Finding, error)
		cure string // of a check that could not be made
	}{
		{"database", checkDatabase, "Check POSTGRES_URL, and that Postgres is running and reachable."},
		{"schema", checkSchema, "Run the command migrate."},
		{"grants", checkGrants, "Run the command migrate as the owner of the tables."},
		{"indexes", checkIndexes, "REINDEX CONCURRENTLY the invalid ones; run the command migrate for the missing ones."},
		{"durability", checkDurability, "Set synchronous_commit to on (or stricter) for the database and its roles, and fsync to on."},
		{"clock", checkClock, "Synchronise the clocks of this machine and of Postgres' (NTP), by slewing and not by steps."},
		{"cluster", checkCluster, "Run the command outbox repair once, then start the relay."},
		{"sequences", checkSequences, "Run the command outbox repair once."},
		{"relay", checkRelay, "Start a relay, and look at its log."},
		{"backlog", checkBacklog, "See whether the broker is reachable and takes messages, and look at the relay's log."},
		{"doorbell", checkDoorbell, "Give a direct connection as POSTGRES_LISTEN_URL; a transaction-mode pooler drops LISTEN."},
		{"retention", checkRetention, "Shorten the slots of the outbox (outbox_slot_length), or the retries of the inbox."},
		{"vacuum", checkVacuum, "End the session, prepared transaction or replication slot that is named."},
		{"retries", checkRetries, "See the message's last error; mend the handler or what it needs."},
		{"broker", checkBroker, "Check AMQP_URL, and that RabbitMQ is running and reachable."},
		{"queues", checkQueues, "Empty and delete the queue that differs, or give the new one another name."},
		{"policies", checkPolicies, "Except our queues from the policy (its pattern), or take the setting out of it."},
	}
	var findings []Finding
	for _, one := range checks {
		limited, cancel := context.WithTimeout(ctx, 10*time.Second)
		finding, err := one.run(limited, p)
		cancel()
		if err != nil {
			finding = Finding{Verdict: Wrong, Detail: strings.Join(strings.Fields(err.Error()), " ")} // drivers break lines
		}
		finding.Check = one.name
		if finding.Verdict == "" {
			finding.Verdict = OK
		}
		if finding.Verdict != OK && finding.Cure == "" {
			finding.Cure = one.cure
		}
		findings = append(findings, finding)
		if one.name == "database" && finding.Verdict == Wrong {
			break // the rest would say the same
		}
	}
	return findings
}

func checkDatabase(ctx context.Context, p Patient) (Finding, error) {
	var version string
	var number int
	var standby bool
	err := p.DB.QueryRow(ctx, `SELECT current_setting('server_version'), current_setting('server_version_num')::integer, pg_is_in_recovery()`).
		Scan(&version, &number, &standby)
	switch {
	case err != nil:
		return Finding{}, err
	case standby:
		return Finding{Verdict: Wrong, Detail: "this is a standby, which takes no writes", Cure: "Add target_session_attrs=read-write and all hosts to POSTGRES_URL."}, nil
	case number < oldestPostgres*10_000:
		return Finding{Verdict: Wrong, Detail: "PostgreSQL " + version, Cure: fmt.Sprintf("Use PostgreSQL %d or newer.", oldestPostgres)}, nil
	}
	return Finding{Detail: "PostgreSQL " + version}, nil
}

// oldestPostgres is the oldest major version that the schema works with.
const oldestPostgres = 15

func checkSchema(ctx context.Context, p Patient) (Finding, error) {
	db := stdlib.OpenDBFromPool(p.DB)
	defer db.Close()
	pending, err := migrations.Pending(ctx, db)
	if err != nil {
		return Finding{}, err
	}
	if pending {
		return Finding{Verdict: Wrong, Detail: "migrations of this binary are not applied"}, nil
	}
	return Finding{Detail: "up to date"}, nil
}

// names runs a query that finds what is wrong, one text a row.
func names(ctx context.Context, p Patient, sql string, args ...any) ([]string, error) {
	rows, err := p.DB.Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// none makes the finding of a check that looks for what is wrong.
func none(found []string, err error, verdict Verdict, otherwise string) (Finding, error) {
	if err != nil || len(found) == 0 {
		return Finding{Detail: otherwise}, err
	}
	return Finding{Verdict: verdict, Detail: strings.Join(found, "; ")}, nil
}

// What migrations grant, as far as the core's tables and functions go: the domain's are its own.
const grantsSQL = `
SELECT format('%s may not %s %s', role, lower(privilege), object) FROM (VALUES
    ('app_api', 'outbox_message', '{INSERT}'), ('app_consumer', 'outbox_message', '{INSERT}'), ('app_operator', 'outbox_message', '{INSERT}'),
    ('app_relay', 'outbox', '{SELECT}'), ('app_relay', 'outbox_cursor', '{SELECT,UPDATE}'),
    ('app_relay', 'outbox_relay', '{SELECT,INSERT,UPDATE,DELETE}'), ('app_relay', 'dead_letter', '{INSERT}'),
    ('app_consumer', 'inbox', '{SELECT,INSERT,UPDATE}'), ('app_consumer', 'inbox_retry', '{SELECT,INSERT,UPDATE,DELETE}'),
    ('app_consumer', 'dead_letter', '{SELECT,INSERT}'),
    ('app_operator', 'outbox', '{SELECT}'), ('app_operator', 'outbox_cursor', '{SELECT}'), ('app_operator', 'outbox_backlog', '{SELECT}'),
    ('app_consumer', 'inbox_consumer', '{SELECT,INSERT,UPDATE,DELETE}'), ('app_consumer', 'inbox_pause', '{SELECT}'),
    ('app_operator', 'inbox', '{SELECT,INSERT}'), ('app_operator', 'inbox_retry', '{SELECT,INSERT}'), ('app_operator', 'inbox_consumer', '{SELECT}'),
    ('app_operator', 'inbox_pause', '{SELECT,INSERT,DELETE}'), ('app_operator', 'operator_audit', '{SELECT,INSERT}'),
    ('app_operator', 'dead_letter', '{SELECT}'), ('app_operator', 'dead_letter_audit', '{SELECT,INSERT}')
) AS wanted (role, object, privileges), unnest(privileges::text[]) AS privilege
WHERE NOT has_table_privilege(role, object, privilege)
UNION ALL
SELECT 'app_operator may not resolve dead_letter' WHERE NOT has_column_privilege('app_operator', 'dead_letter', 'resolution', 'UPDATE')
UNION ALL
SELECT format('%s may not call %s', role, oid::regprocedure) FROM (VALUES
    ('{app_api,app_consumer,app_operator}', '{outbox_insert,outbox_schedule,outbox_unschedule}'),
    ('{app_relay,app_consumer,app_operator}', '{sequences_behind,outbox_stray_shards}'),
    ('{app_api,app_relay,app_operator}', '{outbox_measure}'), ('{app_relay}', '{outbox_sweep,outbox_move_due}'),
    ('{app_operator}', '{outbox_set_shards,outbox_repair,inbox_bury,operation_cancel}'), ('{app_consumer}', '{inbox_sweep}')
) AS wanted (roles, functions), unnest(roles::text[]) AS role, unnest(functions::text[]) AS function JOIN pg_proc ON proname = function
WHERE pg_function_is_visible(oid) AND NOT has_function_privilege(role, oid, 'EXECUTE')`

func checkGrants(ctx context.Context, p Patient) (Finding, error) {
	found, err := names(ctx, p, grantsSQL)
	return none(found, err, Wrong, "roles have what they need")
}

const indexesSQL = `
SELECT 'missing: ' || wanted FROM unnest($1::text[]) AS wanted WHERE to_regclass(wanted) IS NULL
UNION ALL
SELECT 'invalid: ' || indexrelid::regclass FROM pg_index WHERE NOT indisvalid AND indrelid::regclass::text ~ '^(outbox|inbox|dead_letter)'`

func checkIndexes(ctx context.Context, p Patient) (Finding, error) {
	found, err := names(ctx, p, indexesSQL, []string{
		"outbox_pkey", "outbox_xid_idx", "outbox_created_at_idx", "outbox_cursor_pkey", "outbox_scheduled_pkey", "outbox_scheduled_due_idx",
		"outbox_scheduled_latest_idx", "inbox_pkey", "inbox_slot_foreign_received_at_idx", "inbox_retry_pkey", "inbox_retry_key_idx", "inbox_retry_due_idx",
		"inbox_retry_head_idx", "inbox_retry_message_id_idx",
		"dead_letter_pkey", "dead_letter_open_idx", "dead_letter_message_id_idx", "dead_letter_audit_letter_id_idx",
		"inbox_pause_pkey", "inbox_consumer_pkey", "operator_audit_pkey",
	})
	return none(found, err, Wrong, "present and valid")
}

const durabilitySQL = `
SELECT 'synchronous_commit is ' || setting FROM pg_settings WHERE name = 'synchronous_commit' AND setting = 'off'
UNION ALL
SELECT 'fsync is off' FROM pg_settings WHERE name = 'fsync' AND setting = 'off'
UNION ALL
SELECT format('synchronous_commit is off for %s', CASE setrole WHEN 0 THEN 'the database' ELSE setrole::regrole::text END)
FROM pg_db_role_setting
WHERE 'synchronous_commit=off' = ANY (setconfig) AND setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
  AND (setrole IN (0, session_user::regrole) OR setrole::regrole::text LIKE 'app\_%')`

func checkDurability(ctx context.Context, p Patient) (Finding, error) {
	found, err := names(ctx, p, durabilitySQL)
	return none(found, err, Wrong, "commits reach the disk")
}

func checkCluster(ctx context.Context, p Patient) (Finding, error) {
	native, err := outbox.IsNative(ctx, p.DB)
	if err == nil && !native {
		return Finding{Verdict: Wrong, Detail: outbox.ErrForeignCluster.Error()}, nil
	}
	return Finding{Detail: "the cursor belongs to it"}, err
}

func checkRelay(ctx context.Context, p Patient) (Finding, error) {
	shards, err := outbox.Status(ctx, p.DB)
	if err != nil {
		return Finding{}, err
	}
	held, free := 0, []string{}
	for _, one := range shards {
		switch {
		case one.Drained:
		case one.Owner == "":
			free = append(free, fmt.Sprintf("no relay holds shard %d", one.Shard))
		default:
			held++
		}
	}
	return none(free, nil, Wrong, fmt.Sprintf("%d %s held", held, plural(held, "shard is", "shards are")))
}

// maxLag is the age at which an undelivered message is a reason to look.
const maxLag = time.Minute

func checkBacklog(ctx context.Context, p Patient) (Finding, error) {
	backlog, err := outbox.Measure(ctx, p.DB, 2*time.Second)
	if err != nil {
		return Finding{}, err
	}
	var messages int64
	var age time.Duration
	for _, one := range backlog {
		messages, age = messages+one.Messages, max(age, one.Age)
	}
	finding := Finding{Detail: fmt.Sprintf("%d %s, the oldest %s old", messages, plural(int(messages), "message", "messages"), age.Round(time.Second))}
	if age > maxLag {
		finding.Verdict = Wrong
	}
	return finding, nil
}

func checkDoorbell(ctx context.Context, p Patient) (Finding, error) {
	if p.ListenURL == "" {
		return Finding{Detail: "none: the relay polls"}, nil
	}
	took, err := outbox.TryDoorbell(ctx, p.PostgresURL, p.ListenURL)
	if err != nil {
		return Finding{}, err
	}
	return Finding{Detail: fmt.Sprintf("heard after %s", took.Round(10*time.Microsecond))}, nil
}

func checkRetention(ctx context.Context, p Patient) (Finding, error) {
	detail, err := CheckRetention(ctx, p.DB, p.LongestRedelivery)
	return Finding{Detail: detail}, err
}

// maxHold is how long something may hold back vacuum before somebody should look.
const maxHold = 10 * time.Minute

func checkVacuum(ctx context.Context, p Patient) (Finding, error) {
	holders, err := postgres.Holders(ctx, p.DB)
	if err != nil {
		return Finding{}, err
	}
	var old []string
	for _, one := range holders {
		if one.Seconds > maxHold.Seconds() || one.Kind == "slot" && one.Transactions > 10_000_000 {
			old = append(old, fmt.Sprintf("%s %s holds it back for %s and %d transactions", one.Kind, one.Name, time.Duration(one.Seconds)*time.Second, one.Transactions))
		}
	}
	return none(old, nil, Attention, "nothing holds it back")
}

// maxBlocked is how many keys the doctor looks at, those that have waited longest.
const maxBlocked = 1000

func checkRetries(ctx context.Context, p Patient) (Finding, error) {
	blocked, err := inbox.Blocked(ctx, p.DB, maxBlocked)
	if err != nil {
		return Finding{}, err
	}
	var old []string
	for _, one := range blocked {
		if waits := time.Since(one.Since); waits > maxHold {
			old = append(old, fmt.Sprintf("key %q of %s waits for %s", one.Key, one.Consumer, waits.Round(time.Minute)))
		}
	}
	return none(old[:min(len(old), 5)], nil, Attention, fmt.Sprintf("%d %s for a retry", len(blocked), plural(len(blocked), "key waits", "keys wait")))
}

func checkBroker(ctx context.Context, p Patient) (Finding, error) {
	version, err := rabbit.Version(ctx, p.AMQPURL)
	if err != nil {
		return Finding{}, err
	}
	return judgeBroker(version), nil
}

// oldestRabbitMQ is the oldest major version that is still mended.
const oldestRabbitMQ = 4

func judgeBroker(version string) Finding {
	finding := Finding{Detail: version}
	_, number, _ := strings.Cut(version, " ")
	major, _, _ := strings.Cut(number, ".")
	if n, err := strconv.Atoi(major); err != nil || n < oldestRabbitMQ {
		finding.Verdict = Attention
		finding.Cure = fmt.Sprintf("Plan the way to RabbitMQ %d: it works with this one, which is not mended any more.", oldestRabbitMQ)
	}
	return finding
}

func checkQueues(ctx context.Context, p Patient) (Finding, error) {
	missing, err := p.Topology.Compare(ctx, p.AMQPURL)
	if finding, broken := brokenQueue(err); broken {
		return finding, nil
	}
	if err != nil {
		return Finding{}, err
	}
	finding, err := none(missing, nil, Attention, fmt.Sprintf("%d queues are as wanted", 2*len(p.Topology.Queues)))
	if finding.Verdict != "" {
		finding.Cure = "Start the relay or a consumer: they declare what is missing."
	}
	return finding, err
}

// Worst is the most serious verdict among findings.
func Worst(findings []Finding) Verdict {
	order := []Verdict{OK, Attention, Wrong}
	worst := slices.MaxFunc(findings, func(a, b Finding) int { return slices.Index(order, a.Verdict) - slices.Index(order, b.Verdict) })
	return worst.Verdict
}
