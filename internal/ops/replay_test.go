package ops

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/rabbit"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func hour(n int) time.Duration { return time.Duration(n) * time.Hour }

// A new group gets older messages by a replay to its queue alone. Then a replay goes to all queues. No group applies a
// message twice.
func TestReplayToANewGroup(t *testing.T) {
	t.Parallel()
	f := &fixture{Pool: testenv.Postgres(t)}
	f.exec(t, `CREATE TABLE applied (consumer text, name text)`)
	const n = 20
	for i := range n {
		f.insert(t, fmt.Sprint("k", i%3), fmt.Sprintf("m%02d", i))
	}
	url := testenv.AMQP(t)
	topology := rabbit.Topology{Exchange: "events", Queues: []rabbit.Queue{{Name: "old", Types: f.types()}}}
	f.consume(t, url, topology, "old")
	f.delivered(t)
	replay := func(queue string) {
		t.Helper()
		publisher := rabbit.NewPublisher(rabbit.PublisherConfig{URL: url, Topology: topology, Queue: queue})
		defer publisher.Close()
		done, err := outbox.Replay(t.Context(), f.Pool, publisher, outbox.ReplayFilter{}, 1e6, nil)
		if err != nil || done.Published != n || done.Unroutable != 0 {
			t.Fatalf("replayed %+v, %v", done, err)
		}
	}
	replay("") // replaces the relay: the old group applies everything
	f.await(t, "old", n, n)

	topology.Queues = append(topology.Queues, rabbit.Queue{Name: "new", Types: f.types()})
	f.consume(t, url, topology, "new")
	replay("new")
	f.await(t, "new", n, n)
	f.await(t, "old", n, n)

	replay("")
	f.await(t, "new", n, 2*n)
	f.await(t, "old", n, 2*n)
}

// consume runs a consumer group until the test ends.
func (f *fixture) consume(t *testing.T, url string, topology rabbit.Topology, name string) {
	t.Helper()
	group := inbox.NewGroup(name)
	inbox.Handle(group, func(ctx context.Context, tx pgx.Tx, message *wrapperspb.StringValue) error {
		_, err := tx.Exec(ctx, `INSERT INTO applied VALUES ($1, $2)`, name, message.GetValue())
		return err
	})
	var handle func(context.Context, []messaging.Delivery) error = inbox.New(f.Pool, group, inbox.Config{}).Process
	consumer := rabbit.NewConsumer(
		rabbit.ConsumerConfig{URL: url, Topology: topology, Queue: name, Prefetch: 10, Batch: 5}, handle)
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := consumer.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { stop(); running.Wait() })
}

// await waits until a group has received that many copies, and checks that it has applied that many messages, each
// once.
func (f *fixture) await(t *testing.T, consumer string, applied, copies int) {
	t.Helper()
	testenv.Eventually(t, 20*time.Second, func() error {
		var seen, all, different int
		err := f.QueryRow(t.Context(), `
			SELECT (SELECT coalesce(sum(copies), 0) FROM inbox WHERE consumer = $1), count(*), count(DISTINCT name)
			FROM applied WHERE consumer = $1`, consumer).Scan(&seen, &all, &different)
		if err != nil || seen < copies {
			return fmt.Errorf("%s: %d of %d copies, %v", consumer, seen, copies, err)
		}
		if seen != copies || all != applied || different != applied {
			t.Errorf("%s: %d copies, %d applied, %d of them different; want %d, %d, %d",
				consumer, seen, all, different, copies, applied, applied)
		}
		return nil
	})
}
