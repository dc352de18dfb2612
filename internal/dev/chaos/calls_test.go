package chaos

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"example.com/shop/internal/changes"
	"example.com/shop/internal/dev/probe"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/operations"
	"example.com/shop/internal/outbox"
	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func init() { logins["worker"] = "consumer" } // the consumer executes durable calls

// TestDurableCalls makes a thousand durable calls while it kills the workers at random. Each call has exactly one
// result and one effect.
func TestDurableCalls(t *testing.T) {
	t.Parallel()
	const calls, faults = 1000, 30 * time.Second
	s := newStage(t, buildVictim(t))
	s.start(t, "relay")
	workers := []*process{s.start(t, "worker"), s.start(t, "worker")}
	var submitting errgroup.Group
	submitting.Go(func() error { return s.submit(t, calls, faults) })
	random := rand.New(rand.NewPCG(*seed, 1))
	kills := 0
	for began := time.Now(); time.Since(began) < faults; kills++ {
		time.Sleep(time.Duration(100+random.IntN(600)) * time.Millisecond)
		i := random.IntN(len(workers))
		_ = workers[i].command.Process.Kill()
		<-workers[i].done
		workers[i] = s.start(t, "worker")
	}
	if err := submitting.Wait(); err != nil {
		t.Fatal(err)
	}
	if kills < 10 {
		t.Fatalf("only %d kills: nothing was tested", kills)
	}
	testenv.Eventually(t, 90*time.Second, func() error {
		var ended int
		err := s.db.QueryRow(t.Context(), `SELECT count(*) FROM operation WHERE ended_at IS NOT NULL`).Scan(&ended)
		if err == nil && ended < calls {
			err = fmt.Errorf("%d of %d calls have a result", ended, calls)
		}
		return err
	})
	s.checkCalls(t, calls)
	var repeated int
	// An effect that was lost with its worker leaves a gap in the sequence.
	err := s.db.QueryRow(t.Context(), `SELECT max(seq) - count(*) FROM effects`).Scan(&repeated)
	if err != nil || repeated == 0 {
		t.Errorf("%d calls were repeated, %v: nothing was tested", repeated, err)
	}
	t.Logf("%d calls, %d kills, %d effects lost and repeated", calls, kills, repeated)
}

// submit submits calls at a constant rate within this time.
func (s *stage) submit(t *testing.T, calls int, within time.Duration) error {
	out := outbox.NewWriter(s.db, nil, nil)
	store := operations.New(s.db, out, changes.New(changes.Config{}), operations.Config{})
	for i := range calls {
		call := operations.Call{
			Procedure: probe.Mutate.Procedure, Request: wrapperspb.String(fmt.Sprint("call ", i)), Key: fmt.Sprint(i),
		}
		for range 2 { // the second submission is a duplicate
			err := out.Transact(t.Context(), func(tx pgx.Tx) error {
				_, err := store.Submit(t.Context(), tx, call)
				return err
			})
			if err != nil {
				return err
			}
		}
		time.Sleep(within / time.Duration(2*calls))
	}
	return nil
}

// checkCalls checks that each call has exactly one response and one effect of its own.
func (s *stage) checkCalls(t *testing.T, calls int) {
	t.Helper()
	rows, _ := s.db.Query(t.Context(), `SELECT response FROM operation`)
	responses, err := pgx.CollectRows(rows, pgx.RowTo[[]byte])
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]int{}
	for _, response := range responses {
		got[textOf(t, response)]++
	}
	rows, _ = s.db.Query(t.Context(), `SELECT message FROM effects`)
	effects, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	made := map[string]int{}
	for _, effect := range effects {
		made[effect]++
	}
	for i := range calls {
		if text := fmt.Sprint("call ", i); got[text] != 1 || made[text] != 1 {
			t.Errorf("%s: %d results, %d effects", text, got[text], made[text])
		}
	}
	if len(responses) != calls || len(effects) != calls {
		t.Errorf("%d results and %d effects of %d calls", len(responses), len(effects), calls)
	}
}

// textOf decodes a stored response. It returns an empty text for a failed call, which has none.
func textOf(t *testing.T, response []byte) string {
	t.Helper()
	var result anypb.Any
	var text wrapperspb.StringValue
	if err := proto.Unmarshal(response, &result); err != nil {
		t.Fatal(err)
	}
	if response != nil {
		if err := result.UnmarshalTo(&text); err != nil {
			t.Fatal(err)
		}
	}
	return text.GetValue()
}
