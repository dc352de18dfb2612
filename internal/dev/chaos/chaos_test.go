// Package chaos kills processes at the lines where a crash could cost most. Then it checks that no message is lost or
// doubled, and that the order within each key is kept.
package chaos

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	_ "example.com/shop/internal/inbox" // used by the victim: go test's cache needs the dependency
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	_ "example.com/shop/internal/rabbit" // likewise
	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const (
	keys     = 5
	messages = 200
)

// TestKilled kills the relay or the consumer at each of its failpoints, at different hits of each, and lets another
// process take over.
func TestKilled(t *testing.T) {
	t.Parallel()
	binary := buildVictim(t)
	for _, at := range []struct {
		role, failpoint string
		hits            []int
	}{
		{"relay", "relay.claimed", []int{1, 4}},       // a page is claimed, but not sent
		{"relay", "relay.publishing", []int{10, 75}},  // in the middle of a page
		{"relay", "relay.published", []int{1, 4}},     // a page is sent, but its verdicts are unknown
		{"relay", "relay.confirmed", []int{1, 4}},     // all verdicts are known, but not recorded
		{"relay", "relay.moved", []int{2, 5}},         // the cursor has moved
		{"consumer", "consumer.taken", []int{1, 3}},   // the inbox rows are written, but not committed
		{"consumer", "consumer.handled", []int{1, 3}}, // the effects are written, but not committed
		{"consumer", "consumer.applied", []int{1, 3}}, // committed, but not acked
	} {
		for _, hit := range at.hits {
			t.Run(fmt.Sprintf("%s:%d", at.failpoint, hit), func(t *testing.T) {
				t.Parallel()
				s := newStage(t, binary)
				for i := range messages {
					s.insert(t, i)
				}
				killed := s.start(t, at.role, fmt.Sprintf("FAILPOINT=%s:%d", at.failpoint, hit))
				if at.role == "consumer" {
					s.start(t, "relay") // the consumer needs deliveries
				}
				killed.awaitKill(t)
				s.start(t, "relay")
				s.start(t, "consumer")
				s.awaitEffects(t, messages)
				s.check(t, messages)
			})
		}
	}
}

// stage is a database and a vhost for the processes of a test.
type stage struct {
	binary, postgresURL, amqpURL string
	db                           *pgxpool.Pool
}

func newStage(t *testing.T, binary string) *stage {
	t.Helper()
	s := &stage{binary: binary, db: testenv.Postgres(t), amqpURL: testenv.AMQP(t)}
	s.postgresURL = s.db.Config().ConnString()
	if _, err := s.db.Exec(t.Context(), `
		CREATE TABLE effects (seq bigint GENERATED ALWAYS AS IDENTITY, message text NOT NULL);
		GRANT INSERT ON effects TO shop_consumer`); err != nil {
		t.Fatal(err)
	}
	return s
}

// insert commits the i-th message. Its text contains its key and its number within the key.
func (s *stage) insert(t *testing.T, i int) {
	t.Helper()
	key := fmt.Sprint("key-", i%keys)
	err := postgres.Transact(t.Context(), s.db, func(tx pgx.Tx) error {
		text := fmt.Sprintf("%s/%03d", key, i/keys)
		return outbox.Insert(t.Context(), tx, messaging.New(key, wrapperspb.String(text)))
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (s *stage) awaitEffects(t *testing.T, messages int) {
	t.Helper()
	testenv.Eventually(t, 60*time.Second, func() error {
		var distinct int
		err := s.db.QueryRow(t.Context(), `SELECT count(DISTINCT message) FROM effects`).Scan(&distinct)
		if err == nil && distinct < messages {
			err = fmt.Errorf("%d of %d effects", distinct, messages)
		}
		return err
	})
}

// check compares the effects of each key, in the order of their application, with the inserted messages. It allows only
// the given dead letters.
func (s *stage) check(t *testing.T, messages int, dead ...string) {
	t.Helper()
	got := map[string][]string{}
	rows, err := s.db.Query(t.Context(), `SELECT message FROM effects ORDER BY seq`)
	if err != nil {
		t.Fatal(err)
	}
	effects, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	for _, effect := range effects {
		key, number, _ := strings.Cut(effect, "/")
		got[key] = append(got[key], number)
	}
	want := map[string][]string{}
	for i := range messages {
		key := fmt.Sprint("key-", i%keys)
		want[key] = append(want[key], fmt.Sprintf("%03d", i/keys))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("effects by key (-inserted +applied):\n%s", diff)
	}
	var others int
	err = s.db.QueryRow(t.Context(), `
		SELECT count(*) FROM dead_letter WHERE message_id <> ALL ($1)`, append([]string{}, dead...)).Scan(&others)
	if err != nil || others > 0 {
		t.Errorf("%d unexpected dead letters (%v)", others, err)
	}
}

// process is a running victim.
type process struct {
	command *exec.Cmd
	output  *output
	done    chan struct{}
	err     error // of Wait, valid once done is closed
}

// output is the output of a process so far.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// logins contains the roles in the database of victims that are called differently.
var logins = map[string]string{}

// start starts a victim, which stops at the end of the test.
func (s *stage) start(t *testing.T, role string, environment ...string) *process {
	t.Helper()
	p := &process{command: exec.Command(s.binary, role), output: &output{}, done: make(chan struct{})}
	login, differs := logins[role]
	if !differs {
		login = role
	}
	login = "shop_" + login
	p.command.Env = append(os.Environ(), "POSTGRES_URL="+testenv.As(t, s.postgresURL, login), "AMQP_URL="+s.amqpURL)
	p.command.Env = append(p.command.Env, environment...)
	p.command.Stdout, p.command.Stderr = p.output, p.output
	if err := p.command.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		p.err = p.command.Wait()
	}()
	t.Cleanup(func() {
		_ = p.command.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(20 * time.Second):
			_ = p.command.Process.Kill()
			<-p.done
			t.Errorf("%s did not stop in time", role)
		}
		if t.Failed() {
			t.Logf("output of %s:\n%s", role, p.output)
		}
	})
	return p
}

// awaitKill waits until the failpoint has killed the process. A fault that does not happen proves nothing.
func (p *process) awaitKill(t *testing.T) {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		t.Fatal("the failpoint was not reached within 30 s")
	}
	var exit *exec.ExitError
	if !errors.As(p.err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("ended without SIGKILL: %v\n%s", p.err, p.output)
	}
}

// buildVictim builds the victim with its failpoints.
func buildVictim(t *testing.T) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "victim")
	command := exec.CommandContext(t.Context(), "go", "build", "-tags", "failpoints", "-o", binary, "./victim")
	if output, err := command.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, output)
	}
	return binary
}
