package chaos

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"github.com/jackc/pgx/v5"
)

// TestReadOnlyDatabase: a read-only database, such as a demoted primary, cannot record deliveries. So the relay
// publishes nothing meanwhile. It logs the reason, and continues when the database accepts writes again.
func TestReadOnlyDatabase(t *testing.T) {
	t.Parallel()
	binary := buildVictim(t)
	for name, attributes := range map[string]string{"AnyServer": "any", "OnlyAPrimary": "read-write"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStage(t, binary)
			s.postgresURL = withParameter(t, s.postgresURL, "target_session_attrs", attributes)
			relay := s.start(t, "relay")
			s.insert(t, 0)
			s.awaitCursor(t, 1, 0)

			s.setReadOnly(t, true)
			for i := 1; i < messages; i++ {
				s.insert(t, i)
			}
			testenv.Eventually(t, 20*time.Second, func() error {
				text := relay.output.String()
				if !strings.Contains(text, "read-only") && !strings.Contains(text, "read only") {
					return errors.New("the relay does not log that the database is read-only")
				}
				return nil
			})
			s.setReadOnly(t, false)
			s.awaitCursor(t, messages, 0)
			s.start(t, "consumer")
			s.awaitEffects(t, messages)
			s.check(t, messages)
			if copies := s.copies(t); copies != messages {
				t.Errorf("%d copies of %d messages: some were published without being claimed", copies, messages)
			}
		})
	}
}

// setReadOnly makes the relay's transactions read-only, or ends that. It does not affect those of the test.
func (s *stage) setReadOnly(t *testing.T, on bool) {
	t.Helper()
	name := s.db.Config().ConnConfig.Database
	err := pgx.BeginFunc(t.Context(), s.db, func(tx pgx.Tx) error {
		_, err := tx.Exec(t.Context(), fmt.Sprintf(
			`ALTER ROLE shop_relay IN DATABASE %s SET default_transaction_read_only = %t`,
			pgx.Identifier{name}.Sanitize(), on))
		return err
	})
	if err == nil {
		_, err = s.db.Exec(t.Context(), `
			SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND usename = 'shop_relay'`, name)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func withParameter(t *testing.T, rawURL, name, value string) string {
	t.Helper()
	parsed, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	query := parsed.Query()
	query.Set(name, value)
	parsed.RawQuery = query.Encode()
	return parsed.String()
}
