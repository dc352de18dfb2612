package ops

import (
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rabbit"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
)

// clinic is a healthy service: a database whose shard is held, and a broker with its queues.
type clinic struct {
	*desk
	Target
}

// A server of tests may run without fsync, and it has clocks and sessions that nobody may change. What a database finds
// in its own schema before it looks at pg_catalog takes their place; the doctor's connections look there first.
const shadowSQL = `
CREATE VIEW public.pg_settings AS SELECT name, CASE name WHEN 'fsync' THEN 'on' ELSE setting END AS setting
    FROM pg_catalog.pg_settings;
GRANT SELECT ON public.pg_settings TO PUBLIC;
UPDATE outbox_cursor SET owner = 'relay', lease_expires_at = clock_timestamp() + interval '1 h', lease = '1 h'`

func newClinic(t *testing.T) *clinic {
	t.Helper()
	c := &clinic{desk: &desk{Pool: testenv.Postgres(t)}}
	c.exec(t, shadowSQL)
	url := c.Config().ConnString()
	c.Target = Target{
		DB: open(t, url), PostgresURL: url, ListenURL: url, AMQPURL: testenv.AMQP(t), LongestRedelivery: 12 * time.Hour,
		Topology: rabbit.Topology{Exchange: "events", Queues: []rabbit.Queue{{Name: "group", Types: []string{"type"}}}},
	}
	if err := c.Topology.Declare(t.Context(), c.AMQPURL); err != nil {
		t.Fatal(err)
	}
	c.ManagementURL = testenv.Management(t, c.AMQPURL).URL()
	return c
}

// open returns a pool as operators have it.
func open(t *testing.T, url string) *pgxpool.Pool {
	t.Helper()
	return openAt(t, testenv.As(t, url, "shop_operator"))
}

func openAt(t *testing.T, url string) *pgxpool.Pool {
	t.Helper()
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	config.ConnConfig.RuntimeParams["search_path"] = "public, pg_catalog"
	db, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return db
}

func TestDoctorFindsNothingWrongWithTheHealthy(t *testing.T) {
	t.Parallel()
	c := newClinic(t)
	findings := Doctor(t.Context(), c.Target)
	for _, one := range findings {
		if one.Verdict != OK && one.Check != "broker" { // which may be an old one
			t.Errorf("%+v", one)
		}
	}
	if len(findings) != len(databaseChecks)+len(brokerChecks) || Worst(findings) == Wrong {
		t.Errorf("%d findings, the worst %s", len(findings), Worst(findings))
	}
}

// Each check is made to fail once by breaking what it looks at, and is the only one that then does.
func TestDoctorFinds(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		sql   string
		harm  func(t *testing.T, c *clinic)
		check string
		want  Verdict
		names string // what the finding must name
	}{
		"DatabaseAway": {"", func(t *testing.T, c *clinic) {
			c.DB = open(t,
				"postgres://u:hunter2@127.0.0.1:1/d")
		}, "database", Unknown, "refused"},
		"MigrationsPending": {`DELETE FROM goose_db_version WHERE version_id = (SELECT max(version_id) FROM goose_db_version)`, nil, "schema", Wrong, "not applied"},
		"TableGrant": {`REVOKE UPDATE ON outbox_cursor FROM shop_relay`, nil, "grants", Wrong,
			"shop_relay may not update outbox_cursor"},
		"ColumnGrant": {`REVOKE UPDATE (resolution, resolved_at) ON dead_letter FROM shop_operator`, nil,
			"grants", Wrong, "shop_operator may not resolve"},
		"FunctionGrant": {`REVOKE EXECUTE ON FUNCTION inbox_sweep FROM shop_consumer`, nil, "grants", Wrong,
			"shop_consumer may not call inbox_sweep"},
		"IndexMissing": {`DROP INDEX outbox_xid_idx`, nil, "indexes", Wrong, "missing: outbox_xid_idx"},
		"IndexInvalid": {`UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'inbox_retry_due_idx'::regclass`,
			nil,
			"indexes", Wrong, "invalid: inbox_retry_due_idx"},
		"AsynchronousCommits": {`DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off', current_database()); END $$`, nil,
			"durability", Wrong, "off for the database"},
		"AsynchronousCommitsOfARole": {`DO $$ BEGIN EXECUTE format('ALTER ROLE shop_api IN DATABASE %I SET synchronous_commit = off', current_database()); END $$`, nil,
			"durability", Wrong, "off for shop_api"},
		"NoFsync": {`CREATE OR REPLACE VIEW public.pg_settings AS
			SELECT name, CASE name WHEN 'fsync' THEN 'off' ELSE setting END AS setting FROM pg_catalog.pg_settings`,
			nil, "durability", Wrong, "fsync is off"},
		"SettingOfARole": {`DO $$ BEGIN EXECUTE format('ALTER ROLE shop_relay IN DATABASE %I SET search_path = app', current_database()); END $$`, nil,
			"settings", Attention, "role shop_relay sets search_path to app, and the service to public"},
		"SettingOfTheDatabase": {`DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = serializable', current_database()); END $$`,
			nil, "settings", Attention, "the database sets default_transaction_isolation to serializable"},
		"ClockSkew": {`CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql RETURN pg_catalog.clock_timestamp() + interval '10 s'`, nil,
			"clock", Wrong, "differs by"},
		"ClockSetBack": {`UPDATE outbox_cursor SET moved_at = clock_timestamp() + interval '30 min'`, nil,
			"clock", Wrong, "Postgres' clock was set back: the last move of shard 0 is 00:2"},
		"ClockSetBackForConsumers": {`INSERT INTO inbox_consumer (consumer, owner, applied, expires_at, lease)
			VALUES ('group', 'c', 1, clock_timestamp() + interval '30 min', '3 s')`, nil, "clock", Wrong,
			"the heartbeat of c (group) is 00:2"},
		"SequenceBehind": {`INSERT INTO operator_audit (action, target, reason, actor)
			VALUES ('a', 't', 'r', 'a'), ('a', 't', 'r', 'a');
			SELECT setval(pg_get_serial_sequence('operator_audit', 'id'), 1)`, nil, "sequences", Wrong,
			"operator_audit.id goes on from 1, and 2 is in use"},
		"SequenceNeverUsed": {`UPDATE outbox_cursor SET top_id = 8`, nil, "sequences", Wrong,
			"outbox.id goes on from 0, and 8 is in use"},
		"SequenceOfTheDomain": {`CREATE TABLE of_the_domain (id serial); INSERT INTO of_the_domain VALUES (7)`, nil,
			"sequences", Wrong, "of_the_domain.id goes on from 0, and 7 is in use"},
		"StrayShard": {`SELECT outbox_spread(5, 1)`, nil, "sequences", Wrong,
			"new messages are put into shard 5, which nobody reads"},
		"ForeignCluster": {`UPDATE outbox_cursor SET system_identifier = 1`, nil, "cluster", Wrong,
			"another Postgres cluster"},
		"NoRelay": {`UPDATE outbox_cursor SET lease_expires_at = '-infinity'`, nil, "relay", Wrong,
			"no relay holds shard 0"},
		"Backlog": {`SELECT outbox_insert('type', 'k', ''); UPDATE outbox SET created_at = now() - interval '1 h'`, nil,
			"backlog", Wrong, "1 message, the oldest 1h0m"},
		"DoorbellNotHeard": {"", func(t *testing.T, c *clinic) { c.ListenURL = testenv.PostgresURL(t) }, "doorbell",
			Wrong, "not heard"},
		"DoorbellAway": {"", func(t *testing.T, c *clinic) { c.ListenURL = "postgres://u:hunter2@127.0.0.1:1/d" },
			"doorbell", Unknown, "refused"},
		"OutboxKeepsTooLong": {`CREATE OR REPLACE FUNCTION outbox_slot_length() RETURNS interval LANGUAGE sql IMMUTABLE RETURN interval '2 days'`, nil,
			"retention", Wrong, "10d, redelivery takes at most 12h, the inbox remembers 6d21h"},
		"RedeliveryTakesTooLong": {"", func(_ *testing.T, c *clinic) { c.LongestRedelivery = 6 * 24 * time.Hour },
			"retention", Wrong, "forgets too early"},
		"OldTransaction": {`CREATE VIEW public.pg_stat_activity AS
			SELECT current_database() AS datname, 'report' AS application_name, '' AS backend_type, 0 AS pid,
			pg_catalog.clock_timestamp() - interval '1 h' AS xact_start, '3'::xid AS backend_xmin, NULL::xid AS backend_xid;
			GRANT SELECT ON public.pg_stat_activity TO shop_operator`, nil, "vacuum", Attention, "session report/0"},
		"BlockedKey": {`INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at,
			last_error, created_at)
			VALUES ('group', 'm', 'type', 'k', '', '{}', 3, now(), 'broken', now() - interval '1 h')`, nil, "retries",
			Attention, `key "k" of group waits for 1h`},
		"BrokerAway": {"", func(_ *testing.T, c *clinic) { c.AMQPURL = "amqp://u:hunter2@127.0.0.1:1/" }, "broker",
			Unknown, "refused"},
		"QueueMissing": {"", func(t *testing.T, c *clinic) {
			testenv.Management(t,
				c.AMQPURL).DeleteQueue("group.dead")
		}, "queues", Attention,
			"no queue group.dead"},
		"PolicyThatLoses": {"", func(t *testing.T, c *clinic) { c.policy(t, "message-ttl", 60_000) }, "policies", Wrong,
			"policy limits sets message-ttl=60000 on queue group.dead: messages that wait longer are lost"},
		"PolicyThatHinders": {"", func(t *testing.T, c *clinic) { c.policy(t, "max-length", 1000) }, "policies",
			Attention,
			"policy limits sets max-length=1000 on queue group: it refuses messages beyond the limit"},
		"PoliciesNotToBeSeen": {"", func(_ *testing.T, c *clinic) { c.ManagementURL = "http://u:hunter2@127.0.0.1:1" },
			"policies", Attention, "refused"},
		"QueueDiffers": {"", func(t *testing.T, c *clinic) { redeclare(t, c.AMQPURL, "group") }, "queues", Wrong,
			"group exists with other arguments"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newClinic(t)
			if test.sql != "" {
				c.exec(t, test.sql)
			}
			if test.harm != nil {
				test.harm(t, c)
			}
			for _, one := range Doctor(t.Context(), c.Target) {
				switch {
				case strings.Contains(one.Detail+one.Cure, "hunter2"):
					t.Errorf("a password is shown: %+v", one)
				case one.Check == test.check:
					if one.Verdict != test.want || !strings.Contains(one.Detail, test.names) || one.Cure == "" {
						t.Errorf("got %+v, want %s and %q", one, test.want, test.names)
					}
				case one.Verdict == Wrong || one.Verdict == Unknown:
					t.Errorf("another check is wrong: %+v", one)
				}
			}
		})
	}
}

// redeclare makes a queue anew, as somebody else would.
func redeclare(t *testing.T, url, name string) {
	t.Helper()
	testenv.Management(t, url).DeleteQueue(name)
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	channel, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := channel.QueueDeclare(name, true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
}

func TestVersionsOfTheBroker(t *testing.T) {
	t.Parallel()
	for version, want := range map[string]Verdict{
		"RabbitMQ 3.10.8": Attention, "RabbitMQ 3.13.7": Attention, "RabbitMQ 4.0.1": "", "RabbitMQ 4.2.0-rc.1": "",
		"RabbitMQ 12.0": "", "<nil> <nil>": Attention,
	} {
		if got := judgeBroker(version); got.Verdict != want || got.Detail != version ||
			(want == Attention) != (got.Cure != "") {
			t.Errorf("%s: %+v", version, got)
		}
	}
}

func TestVersionsOfPostgres(t *testing.T) {
	t.Parallel()
	c := newClinic(t)
	c.exec(t, `CREATE FUNCTION public.current_setting(name text) RETURNS text LANGUAGE sql RETURN
		CASE name WHEN 'server_version_num' THEN '140012' WHEN 'server_version' THEN '14.12' ELSE pg_catalog.current_setting(name) END`)
	findings := Doctor(t.Context(), c.Target)
	first := findings[0]
	if first.Check != "database" || first.Verdict != Wrong || first.Detail != "PostgreSQL 14.12" ||
		!strings.Contains(first.Cure, "15") {
		t.Errorf("got %+v", first)
	}
	if len(first.Skipped) != len(databaseChecks)-1 || len(findings) != 1+len(brokerChecks) {
		t.Errorf("got %+v", findings)
	}
}
