package chaos

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

var (
	seed     = flag.Uint64("seed", 1, "seed of the random faults")
	duration = flag.Duration("faults", 60*time.Second, "duration of the faults")
)

// TestCrowd runs two relays and two consumers over two shards. It kills and freezes them at random while it writes
// messages. When a frozen process wakes up, another one may have taken over. On failure the test writes the faults and
// the outcome of each message to a file.
func TestCrowd(t *testing.T) {
	t.Parallel()
	s := newStage(t, buildVictim(t))
	if err := ops.SetShards(t.Context(), s.db, 2); err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(*seed, 0))
	var history strings.Builder
	began := time.Now()
	note := func(format string, args ...any) {
		fmt.Fprintf(&history, "%8.3f "+format+"\n", append([]any{time.Since(began).Seconds()}, args...)...)
	}
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		file := filepath.Join(os.TempDir(), fmt.Sprintf("crowd-seed-%d.txt", *seed))
		if err := os.WriteFile(file, []byte(history.String()+s.outcomes()), 0o600); err == nil {
			t.Logf("seed %d; the history is in %s", *seed, file)
		}
	})

	var writing sync.WaitGroup
	stop := make(chan struct{})
	written := 0
	writing.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				s.insert(t, written)
				written++
			}
		}
	})
	roles := []string{"relay", "relay", "consumer", "consumer"}
	crowd := make([]*process, len(roles))
	for i, role := range roles {
		crowd[i] = s.start(t, role)
	}
	kills, freezes := 0, 0
	for time.Since(began) < *duration {
		time.Sleep(time.Duration(200+random.IntN(1000)) * time.Millisecond)
		i := random.IntN(len(crowd))
		victim := crowd[i]
		if random.IntN(2) == 0 {
			note("SIGKILL %s %d", roles[i], victim.command.Process.Pid)
			_ = victim.command.Process.Kill()
			<-victim.done
			crowd[i] = s.start(t, roles[i])
			note("started %s %d", roles[i], crowd[i].command.Process.Pid)
			kills++
			continue
		}
		frozen := time.Duration(100+random.IntN(2900)) * time.Millisecond // the lease lasts one second
		note("SIGSTOP %s %d for %s", roles[i], victim.command.Process.Pid, frozen)
		_ = victim.command.Process.Signal(syscall.SIGSTOP)
		time.Sleep(frozen)
		_ = victim.command.Process.Signal(syscall.SIGCONT)
		freezes++
	}
	close(stop)
	writing.Wait()
	note("faults end, %d messages written", written)
	if kills < 3 || freezes < 3 {
		t.Fatalf("only %d kills and %d freezes: nothing was tested", kills, freezes)
	}
	s.awaitEffects(t, written)
	s.check(t, written)
	t.Logf("%d messages, %d kills, %d freezes, %d copies absorbed", written, kills, freezes, s.copies(t)-written)
}

func (s *stage) copies(t *testing.T) (n int) {
	t.Helper()
	if err := s.db.QueryRow(t.Context(), `SELECT coalesce(sum(copies), 0) FROM inbox`).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// outcomes describes the outcome of each message.
func (s *stage) outcomes() string {
	rows, err := s.db.Query(context.Background(), `
		SELECT format('%s id %s xid %s shard %s at %s: copies %s, applied %s times',
			convert_from(substr(payload, 3), 'UTF8'), id, xid, shard, created_at,
			(SELECT sum(copies) FROM inbox WHERE inbox.message_id = outbox.message_id),
			(SELECT count(*) FROM effects WHERE message = convert_from(substr(payload, 3), 'UTF8')))
		FROM outbox ORDER BY id`)
	if err != nil {
		return err.Error()
	}
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err.Error()
	}
	return strings.Join(lines, "\n")
}

// TestTakeOver: another relay takes over the shard of a killed relay within twice the lease, and that of a stopped
// relay within half a lease. A relay that wakes up after its lease has expired moves nothing, and logs that.
func TestTakeOver(t *testing.T) {
	t.Parallel()
	binary := buildVictim(t)
	const lease = 5 * time.Second
	for name, end := range map[string]struct {
		signal syscall.Signal
		within time.Duration
	}{
		"Killed":  {syscall.SIGKILL, 2 * lease},
		"Stopped": {syscall.SIGTERM, lease / 2},
		"Frozen":  {syscall.SIGSTOP, 2 * lease},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStage(t, binary)
			setting := "LEASE=" + lease.String()
			relays := []*process{s.start(t, "relay", setting), s.start(t, "relay", setting)}
			first := s.awaitOwner(t, relays[0], relays[1])
			second := relays[0]
			if first == relays[0] {
				second = relays[1]
			}
			testenv.Eventually(t, 20*time.Second, func() error { // only a listed relay can take over
				var listed int
				err := s.db.QueryRow(t.Context(), `SELECT count(*) FROM outbox_relay`).Scan(&listed)
				if err != nil || listed < 2 {
					return fmt.Errorf("%d relays are listed, %v", listed, err)
				}
				return nil
			})
			began := time.Now()
			_ = first.command.Process.Signal(end.signal)
			s.awaitOwner(t, second)
			if took := time.Since(began); took > end.within {
				t.Errorf("took over after %s, want within %s", took, end.within)
			}
			if end.signal != syscall.SIGSTOP {
				return
			}
			_ = first.command.Process.Signal(syscall.SIGCONT)
			testenv.Eventually(t, 20*time.Second, func() error {
				if !strings.Contains(first.output.String(), "relay lost its shard, nothing more was moved") {
					return errors.New("the relay that woke up logs nothing")
				}
				return nil
			})
			s.awaitOwner(t, second)
		})
	}
}

// awaitOwner waits until one of these relays has the shard's lease, and returns it.
func (s *stage) awaitOwner(t *testing.T, relays ...*process) (owner *process) {
	t.Helper()
	testenv.Eventually(t, 30*time.Second, func() error {
		var name string
		err := s.db.QueryRow(t.Context(), `
			SELECT owner FROM outbox_cursor WHERE lease_expires_at > clock_timestamp()`).Scan(&name)
		if err != nil {
			return err
		}
		for _, relay := range relays {
			if strings.Contains(name, fmt.Sprintf("/%d/", relay.command.Process.Pid)) {
				owner = relay
				return nil
			}
		}
		return fmt.Errorf("the owner is %s", name)
	})
	return owner
}

// TestPoison: a message crashes every process that handles it. It becomes a dead letter. None of the hundreds of
// messages around it does, although they share its batches and its key.
func TestPoison(t *testing.T) {
	t.Parallel()
	s := newStage(t, buildVictim(t))
	poison := messaging.New("key-0", wrapperspb.String("poison"))
	for i := range messages {
		s.insert(t, i)
		if i == messages/2 {
			err := postgres.Transact(t.Context(), s.db, func(tx pgx.Tx) error {
				return outbox.Insert(t.Context(), tx, poison)
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	s.start(t, "relay")
	consumer, deaths := s.start(t, "consumer"), 0
	testenv.Eventually(t, 2*time.Minute, func() error {
		select {
		case <-consumer.done:
			deaths++
			consumer = s.start(t, "consumer")
		default:
		}
		var dead int
		err := s.db.QueryRow(t.Context(), `SELECT count(*) FROM dead_letter`).Scan(&dead)
		if err != nil || dead == 0 {
			return fmt.Errorf("no dead letter after %d crashes, %v", deaths, err)
		}
		return nil
	})
	s.awaitEffects(t, messages)
	var id, reason string
	err := s.db.QueryRow(t.Context(), `SELECT message_id, reason FROM dead_letter`).Scan(&id, &reason)
	if err != nil || id != poison.ID.String() || reason != "crashed" {
		t.Errorf("dead letter %s, %s, %v", id, reason, err)
	}
	if deaths < 3 {
		t.Errorf("the poison killed only %d processes", deaths)
	}
	s.check(t, messages, poison.ID.String())
}
