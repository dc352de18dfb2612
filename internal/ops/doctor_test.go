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

// healthyService is a healthy service: a database whose shard is held, and a broker with its queues.
type healthyService struct {
	*fixture
	Target
}

// shadowSQL hides the server's own settings: a test server may run without fsync. Tests also replace its clock and its
// sessions, which they cannot change. The doctor's connections find these objects in the public schema before those of
// pg_catalog.
const shadowSQL = `
CREATE VIEW public.pg_settings AS
    SELECT name, CASE name WHEN 'fsync' THEN 'on' ELSE setting END AS setting FROM pg_catalog.pg_settings;
GRANT SELECT ON public.pg_settings TO PUBLIC;
UPDATE outbox_cursor SET owner = 'relay', lease_expires_at = clock_timestamp() + interval '1 h', lease = '1 h'`

func newHealthyService(t *testing.T) *healthyService {
	t.Helper()
	s := &healthyService{fixture: &fixture{Pool: testenv.Postgres(t)}}
	s.exec(t, shadowSQL)
	url := s.Config().ConnString()
	s.Target = Target{
		DB: open(t, url), PostgresURL: url, ListenURL: url, AMQPURL: testenv.AMQP(t), LongestRedelivery: 12 * time.Hour,
		Topology: rabbit.Topology{
			Exchange: "events", Queues: []rabbit.Queue{{Name: "group", Types: []string{"type"}}},
		},
	}
	if err := s.Topology.Declare(t.Context(), s.AMQPURL); err != nil {
		t.Fatal(err)
	}
	s.ManagementURL = testenv.Management(t, s.AMQPURL).URL()
	return s
}

// open returns a pool with the rights of an operator.
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

func TestDoctorFindsNothingWrongWithAHealthyService(t *testing.T) {
	t.Parallel()
	s := newHealthyService(t)
	findings := Doctor(t.Context(), s.Target)
	for _, finding := range findings {
		if finding.Verdict != OK && finding.Check != "broker" { // the broker may be old
			t.Errorf("%+v", finding)
		}
	}
	if len(findings) != len(databaseChecks)+len(brokerChecks) || Worst(findings) == Wrong {
		t.Errorf("%d findings, the worst is %s", len(findings), Worst(findings))
	}
}

// Each case breaks the subject of one check, and only that check then fails.
func TestDoctorFinds(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		sql     string
		breakIt func(t *testing.T, s *healthyService)
		check   string
		want    Verdict
		names   string // must be in the finding
	}{
		"DatabaseAway": {"", func(t *testing.T, s *healthyService) {
			s.DB = open(t, "postgres://u:hunter2@127.0.0.1:1/d")
		}, "database", Unknown, "refused"},
		"MigrationsPending": {
			`DELETE FROM goose_core_version WHERE version_id = (SELECT max(version_id) FROM goose_core_version)`, nil,
			"schema", Wrong, "not applied"},
		"SchemaTooNew": {
			`INSERT INTO goose_core_version (version_id, is_applied, name, breaks)
			VALUES (9999, true, 'core/9999_drop.sql', 9998)`, nil, "schema", Wrong, "core/9999_drop.sql breaks versions"},
		"SchemaChanged": {`UPDATE goose_core_version SET sha256 = 'another' WHERE version_id = 2`, nil,
			"schema", Wrong, "core/0002_inbox.sql is not the file that was applied"},
		"TableGrant": {`REVOKE UPDATE ON outbox_cursor FROM shop_relay`, nil,
			"grants", Wrong, "shop_relay may not update outbox_cursor"},
		"ColumnGrant": {`REVOKE UPDATE (resolution, resolved_at) ON dead_letter FROM shop_operator`, nil,
			"grants", Wrong, "shop_operator may not resolve"},
		"FunctionGrant": {`REVOKE EXECUTE ON FUNCTION inbox_sweep FROM shop_consumer`, nil,
			"grants", Wrong, "shop_consumer may not call inbox_sweep"},
		"IndexMissing": {`DROP INDEX outbox_xid_idx`, nil, "indexes", Wrong, "missing: outbox_xid_idx"},
		"IndexInvalid": {
			`UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'inbox_retry_due_idx'::regclass`, nil,
			"indexes", Wrong, "invalid: inbox_retry_due_idx"},
		"AsynchronousCommits": {`DO $$ BEGIN
			EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off', current_database()); END $$`, nil,
			"durability", Wrong, "off for the database"},
		"AsynchronousCommitsOfARole": {`DO $$ BEGIN
			EXECUTE format('ALTER ROLE shop_api IN DATABASE %I SET synchronous_commit = off', current_database()); END $$`,
			nil, "durability", Wrong, "off for shop_api"},
		"NoFsync": {`CREATE OR REPLACE VIEW public.pg_settings AS
			SELECT name, CASE name WHEN 'fsync' THEN 'off' ELSE setting END AS setting FROM pg_catalog.pg_settings`, nil,
			"durability", Wrong, "fsync is off"},
		"SettingOfARole": {`DO $$ BEGIN
			EXECUTE format('ALTER ROLE shop_relay IN DATABASE %I SET search_path = app', current_database()); END $$`, nil,
			"settings", Attention, "role shop_relay sets search_path to app, the service sets it to public"},
		"SettingOfTheDatabase": {`DO $$ BEGIN EXECUTE
			format('ALTER DATABASE %I SET default_transaction_isolation = serializable', current_database()); END $$`, nil,
			"settings", Attention, "the database sets default_transaction_isolation to serializable"},
		"ClockSkew": {`CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql
			RETURN pg_catalog.clock_timestamp() + interval '10 s'`, nil, "clock", Wrong, "differs by"},
		"ClockSetBack": {`UPDATE outbox_cursor SET moved_at = clock_timestamp() + interval '30 min'`, nil,
			"clock", Wrong, "Postgres' clock was set back: the last move of shard 0 is 00:2"},
		"ClockSetBackForConsumers": {`INSERT INTO inbox_consumer (consumer, owner, applied, expires_at, lease)
			VALUES ('group', 'c', 1, clock_timestamp() + interval '30 min', '3 s')`, nil,
			"clock", Wrong, "the heartbeat of c (group) is 00:2"},
		"SequenceBehind": {`
			INSERT INTO operator_audit (action, target, reason, actor) VALUES ('a', 't', 'r', 'a'), ('a', 't', 'r', 'a');
			SELECT setval(pg_get_serial_sequence('operator_audit', 'id'), 1)`, nil,
			"sequences", Wrong, "operator_audit.id continues from 1, but 2 is in use"},
		"SequenceNeverUsed": {`UPDATE outbox_cursor SET top_id = 8`, nil,
			"sequences", Wrong, "outbox.id continues from 0, but 8 is in use"},
		"SequenceOfTheDomain": {`CREATE TABLE of_the_domain (id serial); INSERT INTO of_the_domain VALUES (7)`, nil,
			"sequences", Wrong, "of_the_domain.id continues from 0, but 7 is in use"},
		"StrayShard": {`SELECT outbox_spread(5, 1)`, nil,
			"sequences", Wrong, "new messages go to shard 5, which no relay reads"},
		"ForeignCluster": {`UPDATE outbox_cursor SET system_identifier = 1`, nil,
			"cluster", Wrong, "another Postgres cluster"},
		"NoRelay": {`UPDATE outbox_cursor SET lease_expires_at = '-infinity'`, nil,
			"relay", Wrong, "no relay holds shard 0"},
		"Backlog": {`SELECT outbox_insert('type', 'k', ''); UPDATE outbox SET created_at = now() - interval '1 h'`, nil,
			"backlog", Wrong, "1 message, the oldest 1h0m"},
		"DoorbellLost": {"", func(t *testing.T, s *healthyService) { s.ListenURL = testenv.PostgresURL(t) },
			"doorbell", Wrong, "did not arrive"},
		"DoorbellAway": {"", func(t *testing.T, s *healthyService) { s.ListenURL = "postgres://u:hunter2@127.0.0.1:1/d" },
			"doorbell", Unknown, "refused"},
		"OutboxKeepsTooLong": {`CREATE OR REPLACE FUNCTION outbox_slot_length() RETURNS interval
			LANGUAGE sql IMMUTABLE RETURN interval '2 days'`, nil,
			"retention", Wrong, "10d, redelivery takes at most 12h, the inbox remembers 6d21h"},
		"RedeliveryTakesTooLong": {"", func(_ *testing.T, s *healthyService) { s.LongestRedelivery = 6 * 24 * time.Hour },
			"retention", Wrong, "forgets too early"},
		"OldTransaction": {`CREATE VIEW public.pg_stat_activity AS
			SELECT current_database() AS datname, 'report' AS application_name, '' AS backend_type, 0 AS pid,
				pg_catalog.clock_timestamp() - interval '1 h' AS xact_start, '3'::xid AS backend_xmin, NULL::xid AS backend_xid;
			GRANT SELECT ON public.pg_stat_activity TO shop_operator`, nil, "vacuum", Attention, "session report/0"},
		"BlockedKey": {`
			INSERT INTO inbox_retry
				(consumer, message_id, type, key, payload, headers, attempts, due_at, last_error, created_at)
			VALUES ('group', 'm', 'type', 'k', '', '{}', 3, now(), 'broken', now() - interval '1 h')`, nil,
			"retries", Attention, `key "k" of group has waited for 1h`},
		"BrokerAway": {"", func(_ *testing.T, s *healthyService) { s.AMQPURL = "amqp://u:hunter2@127.0.0.1:1/" },
			"broker", Unknown, "refused"},
		"QueueMissing": {"", func(t *testing.T, s *healthyService) {
			testenv.Management(t, s.AMQPURL).DeleteQueue("group.dead")
		}, "queues", Attention, "no queue group.dead"},
		"PolicyThatLoses": {"", func(t *testing.T, s *healthyService) { s.policy(t, "message-ttl", 60_000) },
			"policies", Wrong, "policy limits sets message-ttl=60000 on queue group.dead: messages that wait longer are lost"},
		"PolicyThatHinders": {"", func(t *testing.T, s *healthyService) { s.policy(t, "max-length", 1000) },
			"policies", Attention, "policy limits sets max-length=1000 on queue group: it refuses messages beyond the limit"},
		"PoliciesUnreadable": {"", func(_ *testing.T, s *healthyService) { s.ManagementURL = "http://u:hunter2@127.0.0.1:1" },
			"policies", Attention, "refused"},
		"PublisherWithoutLimits": {"", func(t *testing.T, s *healthyService) {
			testenv.Management(t, s.AMQPURL).User("^$", "^(events|other)$", "^$")
		}, "publishers", Attention, "may publish every type to exchange events"},
		"QueueDiffers": {"", func(t *testing.T, s *healthyService) { redeclare(t, s.AMQPURL, "group") },
			"queues", Wrong, "group exists with other arguments"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newHealthyService(t)
			if test.sql != "" {
				s.exec(t, test.sql)
			}
			if test.breakIt != nil {
				test.breakIt(t, s)
			}
			for _, finding := range Doctor(t.Context(), s.Target) {
				switch {
				case strings.Contains(finding.Detail+finding.Cure, "hunter2"):
					t.Errorf("a password is shown: %+v", finding)
				case finding.Check == test.check:
					if finding.Verdict != test.want || !strings.Contains(finding.Detail, test.names) || finding.Cure == "" {
						t.Errorf("got %+v, want %s and %q", finding, test.want, test.names)
					}
				case finding.Verdict == Wrong || finding.Verdict == Unknown:
					t.Errorf("another check has a finding: %+v", finding)
				}
			}
		})
	}
}

// redeclare replaces a queue by one with other arguments, as another service would.
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
		"RabbitMQ 3.10.8": Attention, "RabbitMQ 3.13.7": Attention, "RabbitMQ 4.0.1": "",
		"RabbitMQ 4.2.0-rc.1": "", "RabbitMQ 12.0": "", "<nil> <nil>": Attention,
	} {
		got := judgeBroker(version)
		if got.Verdict != want || got.Detail != version || (want == Attention) != (got.Cure != "") {
			t.Errorf("%s: %+v", version, got)
		}
	}
}

func TestVersionsOfPostgres(t *testing.T) {
	t.Parallel()
	s := newHealthyService(t)
	s.exec(t, `CREATE FUNCTION public.current_setting(name text) RETURNS text LANGUAGE sql RETURN CASE name
		WHEN 'server_version_num' THEN '140012'
		WHEN 'server_version' THEN '14.12'
		ELSE pg_catalog.current_setting(name) END`)
	findings := Doctor(t.Context(), s.Target)
	first := findings[0]
	if first.Check != "database" || first.Verdict != Wrong || first.Detail != "PostgreSQL 14.12" ||
		!strings.Contains(first.Cure, "15") {
		t.Errorf("got %+v", first)
	}
	if len(first.Skipped) != len(databaseChecks)-1 || len(findings) != 1+len(brokerChecks) {
		t.Errorf("got %+v", findings)
	}
}
