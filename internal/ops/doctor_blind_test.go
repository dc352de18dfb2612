package ops

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rabbit"
	"example.com/shop/internal/session"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
)

// altered returns a changed URL.
func altered(t *testing.T, rawURL string, alter func(*url.URL)) string {
	t.Helper()
	parsed, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	alter(parsed)
	return parsed.String()
}

// reach makes the doctor use another URL of the database.
func (s *healthyService) reach(t *testing.T, url string) {
	t.Helper()
	s.DB, s.PostgresURL, s.ListenURL = openAt(t, url), url, url
}

// A doctor that cannot check says so once, with the cure of the obstacle, and never with the cure for what it might
// have found.
func TestDoctorCouldNotLook(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		breakIt func(t *testing.T, s *healthyService)
		check   string
		verdict Verdict
		cure    string   // must be in the cure
		skipped []string // some of the checks that could not run for the same reason
	}{
		"DatabaseAway": {func(t *testing.T, s *healthyService) { s.reach(t, "postgres://u:hunter2@127.0.0.1:1/d") },
			"database", Unknown, "host and port in POSTGRES_URL", []string{"schema", "cluster", "relay", "retries"}},
		"DatabaseWrongPassword": {wrongPassword, "database", Unknown, "user and password in POSTGRES_URL",
			[]string{"schema", "cluster", "relay", "retries"}},
		"DatabaseUnknownUser": {func(t *testing.T, s *healthyService) {
			s.reach(t, altered(t, s.PostgresURL, func(u *url.URL) {
				u.User = url.UserPassword("nobody_here", "hunter2")
			}))
		}, "database", Unknown, "user and password in POSTGRES_URL", []string{"schema", "cluster", "relay", "retries"}},
		"DatabaseWrongName": {func(t *testing.T, s *healthyService) {
			s.reach(t, altered(t, testenv.As(t, s.PostgresURL, "shop_operator"), func(u *url.URL) { u.Path = "/nothing" }))
		}, "database", Unknown, "name in POSTGRES_URL", []string{"schema", "cluster", "relay", "retries"}},
		"DatabaseNoConnect": {func(t *testing.T, s *healthyService) {
			s.exec(t, `DO $$ BEGIN EXECUTE format('REVOKE CONNECT ON DATABASE %I FROM PUBLIC', current_database()); END $$`)
			s.reach(t, testenv.As(t, s.PostgresURL, "shop_operator"))
		}, "database", Unknown, "Grant CONNECT", []string{"schema", "cluster", "relay", "retries"}},
		"DatabaseNoRights": {func(t *testing.T, s *healthyService) { s.reach(t, testenv.As(t, s.PostgresURL, "shop_api")) },
			"clock", Unknown, "Connect as shop_operator", []string{"cluster", "relay", "retries"}},
		"DatabaseNoRightOnOneTable": {func(t *testing.T, s *healthyService) {
			s.exec(t, `REVOKE SELECT ON inbox_retry FROM shop_operator`)
		},
			"clock", Unknown, "Connect as shop_operator", []string{"retries"}},
		"NoSchema": {func(t *testing.T, s *healthyService) {
			s.exec(t, `DROP SCHEMA public CASCADE; CREATE SCHEMA public; GRANT USAGE ON SCHEMA public TO PUBLIC`)
			s.reach(t, testenv.As(t, s.PostgresURL, "shop_operator"))
		}, "schema", Wrong, "Run the command migrate", []string{"grants", "indexes", "cluster", "relay", "retries"}},
		"HalfASchema": {func(t *testing.T, s *healthyService) {
			s.exec(t, `
				DELETE FROM goose_core_version WHERE version_id = (SELECT max(version_id) FROM goose_core_version);
				DROP TABLE inbox_retry`)
		}, "schema", Wrong, "Run the command migrate", []string{"grants", "retries"}},
		"TableMissing": {func(t *testing.T, s *healthyService) { s.exec(t, `DROP TABLE inbox_retry`) },
			"grants", Unknown, "Run the command migrate", []string{"retries"}},
		"DatabaseLocked": {func(t *testing.T, s *healthyService) {
			tx, err := s.fixture.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) })
			if _, err := tx.Exec(t.Context(), `LOCK TABLE outbox_cursor`); err != nil {
				t.Fatal(err)
			}
			s.CheckTimeout = 3 * time.Second
		}, "clock", Unknown, "took too long", []string{"cluster", "relay"}},
		"ListenerAway": {func(_ *testing.T, s *healthyService) { s.ListenURL = "postgres://u:hunter2@127.0.0.1:1/d" },
			"doorbell", Unknown, "host and port in POSTGRES_LISTEN_URL", nil},
		"BrokerAway": {func(_ *testing.T, s *healthyService) { s.AMQPURL = "amqp://u:hunter2@127.0.0.1:1/" },
			"broker", Unknown, "host and port in AMQP_URL", []string{"queues"}},
		"BrokerWrongPassword": {func(t *testing.T, s *healthyService) {
			s.AMQPURL = altered(t, s.AMQPURL, func(u *url.URL) {
				u.User = url.UserPassword(u.User.Username(), "hunter2")
			})
		}, "broker", Unknown, "user and password in AMQP_URL", []string{"queues"}},
		"BrokerWrongVhost": {func(t *testing.T, s *healthyService) {
			s.AMQPURL = altered(t, s.AMQPURL, func(u *url.URL) { u.Path = "/nothing" })
		}, "broker", Unknown, "vhost in AMQP_URL", []string{"queues"}},
		"BrokerNoRights": {func(t *testing.T, s *healthyService) {
			s.AMQPURL = testenv.Management(t, s.AMQPURL).User("^$", "^$", "^$")
		},
			"queues", Unknown, "may configure the queues", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newHealthyService(t)
			test.breakIt(t, s)
			found := false
			for _, finding := range Doctor(t.Context(), s.Target) {
				switch {
				case strings.Contains(finding.Detail+finding.Cure, "hunter2"):
					t.Errorf("a password is shown: %+v", finding)
				case finding.Check == test.check:
					found = true
					if finding.Verdict != test.verdict || !strings.Contains(finding.Cure, test.cure) {
						t.Errorf("got %+v, want %s and %q", finding, test.verdict, test.cure)
					}
					for _, skipped := range test.skipped {
						if !slices.Contains(finding.Skipped, skipped) {
							t.Errorf("%s is not among the skipped checks: %q", skipped, finding.Skipped)
						}
					}
				case finding.Check == "grants" && strings.HasPrefix(finding.Detail, "shop_operator may not select inbox_retry"):
				case finding.Check == "indexes" && strings.HasPrefix(finding.Detail, "missing: inbox_retry"): // with its table
				case finding.Verdict == Wrong || finding.Verdict == Unknown:
					t.Errorf("another check has a finding: %+v", finding)
				}
				for _, other := range append(slices.Clone(databaseChecks), brokerChecks...) {
					if finding.Verdict == Unknown && other.cure != "" && finding.Cure == other.cure {
						t.Errorf("%s could not run, and gives the cure for findings of %s: %s",
							finding.Check, other.name, finding.Cure)
					}
				}
			}
			if !found {
				t.Errorf("no finding for %s", test.check)
			}
		})
	}
}

// wrongPassword starts a database server that requires a password, and uses a wrong one.
func wrongPassword(t *testing.T, s *healthyService) {
	t.Helper()
	owner, _ := testenv.Cluster(t)
	db, err := pgxpool.New(t.Context(), owner)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var folder string
	if err := db.QueryRow(t.Context(), `SHOW data_directory`).Scan(&folder); err != nil {
		t.Fatal(err)
	}
	rules := "host all guarded all scram-sha-256\nhost all all all trust\nlocal all all trust\n"
	if err := os.WriteFile(filepath.Join(folder, "pg_hba.conf"), []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{`CREATE ROLE guarded LOGIN PASSWORD 'right'`, `SELECT pg_reload_conf()`} {
		if _, err := db.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	guarded := altered(t, owner, func(u *url.URL) { u.User = url.UserPassword("guarded", "hunter2") })
	testenv.Eventually(t, 10*time.Second, func() error {
		conn, err := session.Connect(t.Context(), guarded)
		if err == nil {
			_ = conn.Close(t.Context())
			return errors.New("the server does not check passwords yet")
		}
		return nil
	})
	s.reach(t, guarded)
}

// Every kind of failure has a cure, and a failure that does not concern the other checks of a server does not block
// them.
func TestCauses(t *testing.T) {
	t.Parallel()
	code := func(code string) error { return fmt.Errorf("read: %w", &pgconn.PgError{Code: code}) }
	broker := func(code int, connecting bool) error {
		err := fmt.Errorf("declare: %w", &amqp.Error{Code: code, Server: true})
		if connecting {
			err = fmt.Errorf("%w: %w", rabbit.ErrNotConnected, err)
		}
		return err
	}
	for name, test := range map[string]struct {
		cause cause
		cure  string
		whole bool
	}{
		"password":          {databaseCause(code("28P01"), "X"), "password in X", true},
		"pg_hba":            {databaseCause(code("28000"), "X"), "pg_hba", true},
		"database":          {databaseCause(code("3D000"), "X"), "name in X", true},
		"connections":       {databaseCause(code("53300"), "X"), "connections", true},
		"starting":          {databaseCause(code("57P03"), "X"), "starting", true},
		"shut down":         {databaseCause(code("57P01"), "X"), "stopping", true},
		"permission":        {databaseCause(code("42501"), "X"), "shop_operator", false},
		"table":             {databaseCause(code("42P01"), "X"), "migrate", false},
		"function":          {databaseCause(code("42883"), "X"), "migrate", false},
		"column":            {databaseCause(code("42703"), "X"), "migrate", false},
		"role":              {databaseCause(code("42704"), "X"), "migrate", false},
		"statement timeout": {databaseCause(code("57014"), "X"), "too long", false},
		"lock timeout":      {databaseCause(code("55P03"), "X"), "too long", false},
		"own timeout": {
			databaseCause(fmt.Errorf("read: %w", context.DeadlineExceeded), "X"), "too long", false,
		},
		"connection lost":   {databaseCause(fmt.Errorf("read: %w", io.ErrUnexpectedEOF), "X"), "host and port in X", true},
		"other server":      {databaseCause(otherServer{"Y", code("28P01")}, "X"), "password in Y", false},
		"unknown code":      {databaseCause(code("XX000"), "X"), "log", false},
		"unknown error":     {databaseCause(errors.New("odd"), "X"), "Read the error", false},
		"broker login":      {brokerCause(broker(amqp.AccessRefused, true), "X"), "password in X", true},
		"broker vhost":      {brokerCause(broker(amqp.NotAllowed, true), "X"), "vhost in X", true},
		"broker permission": {brokerCause(broker(amqp.AccessRefused, false), "X"), "may configure", false},
		"broker error":      {brokerCause(broker(amqp.InternalError, false), "X"), "broker's log", false},
		"broker cut": {
			brokerCause(fmt.Errorf("%w: %w", rabbit.ErrNotConnected, amqp.ErrClosed), "X"), "host and port in X", true,
		},
		"broker timeout": {
			brokerCause(fmt.Errorf("read: %w", context.DeadlineExceeded), "X"), "too long", false,
		},
		"broker mute socket": {
			brokerCause(fmt.Errorf("%w: %w", rabbit.ErrNotConnected, amqp.ErrCredentials), "X"), "password in X", true,
		},
	} {
		if test.cause.kind == "" || !strings.Contains(test.cause.cure, test.cure) || test.cause.blocksAll != test.whole {
			t.Errorf("%s: %+v", name, test.cause)
		}
	}
}
