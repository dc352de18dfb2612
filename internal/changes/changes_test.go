package changes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/session"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestWatchYieldsTheCurrentStateAndThenLaterOnes(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	p := start(t, url, Config{NotifyURL: url, ListenURL: url, SafetyInterval: never})
	p.watch(t, "none").wantError(t, ErrNotFound)
	p.set(t, "one", "a", "b")
	w := p.watch(t, "a")
	w.want(t, "one")
	p.set(t, "one", "a")  // touched but not changed
	p.set(t, "else", "b") // another key
	p.set(t, "two", "a")
	w.want(t, "two")
	p.watch(t, "a").want(t, "two")
	err := postgres.Transact(t.Context(), p.db, func(tx pgx.Tx) error {
		p.Touch(tx, "a")
		_, err := tx.Exec(t.Context(), `DELETE FROM probe WHERE key = 'a'`)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	w.wantError(t, ErrNotFound)
}

func TestWatchEndsWithItsContext(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	p := start(t, url, Config{NotifyURL: url, ListenURL: url, SafetyInterval: never})
	p.set(t, "one", "a")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	states := 0
	for _, err := range p.Watch(ctx, "a") {
		if states++; states == 1 {
			cancel()
		} else if !errors.Is(err, context.Canceled) {
			t.Errorf("ended with error %v", err)
		}
	}
	if states != 2 || len(p.watchers) != 0 || len(p.stale) != 0 {
		t.Errorf("%d states; left behind: %v, %v", states, p.watchers, p.stale)
	}
}

// 1,000 watchers cost the database as much as one, whether they watch the same key or different ones.
func TestManyWatchersCostWhatOneDoes(t *testing.T) {
	t.Parallel()
	const changed = 20
	same := func(int) string { return "key" }
	cost := map[string]int64{
		"one":                    statements(t, 1, changed, same),
		"many of the same key":   statements(t, 1000, changed, same),
		"many of different keys": statements(t, 1000, changed, func(i int) string { return fmt.Sprint("key-", i) }),
	}
	t.Logf("statements for %d changes: %v", changed, cost)
	for name, n := range cost {
		if n > cost["one"]+2 || n > changed+2 {
			t.Errorf("%s: %d statements for %d changes", name, n, changed)
		}
	}
}

// statements returns how many statements it takes to deliver a number of changes to watchers. It makes each change
// after all watchers have seen the one before.
func statements(t *testing.T, watchers, changed int, key func(i int) string) int64 {
	t.Helper()
	url := newDatabase(t)
	p := start(t, url, Config{NotifyURL: url, ListenURL: url, SafetyInterval: never})
	distinct := map[string]bool{}
	for i := range watchers {
		distinct[key(i)] = true
	}
	keys := slices.Collect(maps.Keys(distinct))
	p.set(t, "0", keys...)
	arrived := make(chan struct{}, watchers)
	ctx, cancel := context.WithCancel(t.Context())
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	for i := range watchers {
		watching.Go(func() {
			for _, err := range p.Watch(ctx, key(i)) {
				if err == nil {
					arrived <- struct{}{}
				}
			}
		})
	}
	for n := range changed + 1 {
		for range watchers {
			<-arrived
		}
		switch n {
		case changed:
			return p.reads.Load()
		case 0:
			p.reads.Store(0) // the number of rounds until all have joined depends on how fast they join
		}
		p.set(t, fmt.Sprint(n+1), keys...)
	}
	return 0
}

func TestWithoutWatchersNothingIsRead(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	p := start(t, url, Config{NotifyURL: url, ListenURL: url, SafetyInterval: time.Millisecond})
	p.set(t, "one", "a")
	for range p.Watch(t.Context(), "a") {
		break
	}
	before := p.reads.Load()
	for i := range 10 {
		p.set(t, fmt.Sprint(i), "a")
	}
	if n := p.reads.Load(); n != before {
		t.Errorf("got %d statements, want none", n-before)
	}
}

func TestChangesOfAnotherProcess(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	writer := newProcess(t, url, Config{NotifyURL: url})
	writer.run(t, writer.hub.Ring) // as a consumer does, which has no watchers
	reader := start(t, url, Config{NotifyURL: url, ListenURL: url, SafetyInterval: never})
	writer.set(t, "0", "a")
	w := reader.watch(t, "a")
	w.want(t, "0")
	reader.awaitListening(t, "a", w)
	for i := 1; i <= 20; i++ {
		writer.set(t, fmt.Sprint(i), "a")
		w.want(t, fmt.Sprint(i))
	}

	// More keys at once than notifications name.
	many := []string{"a"}
	for i := range maxKeys {
		many = append(many, fmt.Sprint("key-", i))
	}
	writer.set(t, "many", many...)
	w.want(t, "many")
	// Postgres refuses a key that is too long for a notification. Then everything may have changed.
	writer.set(t, "long", "a", strings.Repeat("x", 2000)+strings.Repeat("\x01", 2000))
	w.want(t, "long")
}

// awaitListening returns when p receives notifications. Only a read that a notification causes shows this.
func (p *process) awaitListening(t *testing.T, key string, w watch) {
	t.Helper()
	before := p.reads.Load()
	err := session.With(t.Context(), p.hub.config.NotifyURL, func(conn *pgx.Conn) error {
		testenv.Eventually(t, 20*time.Second, func() error {
			if _, err := conn.Exec(t.Context(), "NOTIFY "+channel); err != nil {
				return err
			}
			if p.reads.Load() == before {
				return errors.New("process does not listen yet")
			}
			return nil
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Changes that are rung while the connection is lost are found when the process listens again.
func TestListeningConnectionLost(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	line, through := testenv.ProxyURL(t, url)
	writer := newProcess(t, url, Config{NotifyURL: url})
	writer.run(t, writer.hub.Ring)
	reader := start(t, url, Config{NotifyURL: url, ListenURL: through, SafetyInterval: never})
	writer.set(t, "0", "a")
	w := reader.watch(t, "a")
	w.want(t, "0")
	reader.awaitListening(t, "a", w)
	for i := range 3 {
		testenv.Eventually(t, 20*time.Second, func() error {
			line.Refuse(true)
			if line.Cut() == 0 {
				line.Refuse(false)
				return errors.New("no connection to cut yet")
			}
			return nil
		})
		writer.set(t, fmt.Sprint("away ", i), "a")
		line.Refuse(false)
		w.want(t, fmt.Sprint("away ", i))
		writer.set(t, fmt.Sprint("back ", i), "a")
		w.want(t, fmt.Sprint("back ", i))
	}
}

// A lost ring, such as that of a process that was killed after its commit, delays a state but does not lose it. The
// same is true without a connection to listen on.
func TestLostRings(t *testing.T) {
	t.Parallel()
	for name, config := range map[string]Config{
		"Listening": {SafetyInterval: 50 * time.Millisecond, PollInterval: never},
		"Polling":   {PollInterval: 50 * time.Millisecond, SafetyInterval: never},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := newDatabase(t)
			config.NotifyURL = url
			if name == "Listening" {
				config.ListenURL = url
			}
			silent := newProcess(t, url, config) // no Ring
			reader := start(t, url, config)
			silent.set(t, "0", "a", "b")
			a, b := reader.watch(t, "a"), reader.watch(t, "b")
			for i := range 3 {
				a.want(t, fmt.Sprint(i))
				b.want(t, fmt.Sprint(i))
				silent.set(t, fmt.Sprint(i+1), "a", "b")
			}
		})
	}
}

// A key that changes constantly does not delay the safety reads of other keys.
func TestABusyKeyDoesNotStarveTheOthers(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	config := Config{NotifyURL: url, ListenURL: url, SafetyInterval: 50 * time.Millisecond}
	silent, p := newProcess(t, url, config), start(t, url, config)
	p.set(t, "0", "busy", "quiet")
	quiet := p.watch(t, "quiet")
	quiet.want(t, "0")
	p.watch(t, "busy").want(t, "0")
	p.run(t, func(ctx context.Context) {
		for ctx.Err() == nil {
			p.touched("busy")
			time.Sleep(time.Millisecond) // constant load
		}
	})
	silent.set(t, "1", "quiet")
	quiet.want(t, "1")
}

func TestASlowWatcherGetsTheLastStateAndDelaysNobody(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	p := start(t, url, Config{NotifyURL: url, ListenURL: url, SafetyInterval: never})
	p.set(t, "0", "a")
	slow, quick := p.watch(t, "a"), p.watch(t, "a")
	slow.want(t, "0")
	quick.want(t, "0")
	for i := 1; i <= 20; i++ {
		p.set(t, fmt.Sprint(i), "a")
		quick.want(t, fmt.Sprint(i))
	}
	// The mailbox has room for one state, so the next one is the last.
	got, err, _ := slow.next()
	if err != nil || got.GetValue() != "20" {
		t.Errorf("got state %v, error %v, want the last state", got, err)
	}
}

// A watcher with a state waits until the database is back. A watcher without one gets an error at once.
func TestDatabaseAway(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	p := start(t, url, Config{NotifyURL: url, ListenURL: url, SafetyInterval: never})
	p.set(t, "0", "a")
	w := p.watch(t, "a")
	w.want(t, "0")
	p.away.Store(true)
	p.set(t, "1", "a")
	p.watch(t, "a").wantError(t, postgres.ErrUnavailable)
	p.away.Store(false)
	w.want(t, "1")
}

// A process sends its last changes before it ends.
func TestLastWord(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	reader := start(t, url, Config{NotifyURL: url, ListenURL: url, SafetyInterval: never})
	reader.set(t, "0", "a")
	w := reader.watch(t, "a")
	w.want(t, "0")
	reader.awaitListening(t, "a", w)
	for i := range 10 {
		writer := newProcess(t, url, Config{NotifyURL: url})
		stop := writer.run(t, writer.hub.Ring)
		writer.set(t, fmt.Sprint("first ", i), "a")
		w.want(t, fmt.Sprint("first ", i))
		writer.set(t, "x", "other") // usually the last change comes during the notifyInterval after this one
		writer.set(t, fmt.Sprint("last ", i), "a")
		stop()
		w.want(t, fmt.Sprint("last ", i))

		writer = newProcess(t, url, Config{NotifyURL: url})
		writer.set(t, fmt.Sprint("only ", i), "a")
		stop = writer.run(t, writer.hub.Ring)
		stop() // before it has connected
		w.want(t, fmt.Sprint("only ", i))
	}
}

func TestMoreKeysThanOneStatementReads(t *testing.T) {
	t.Parallel()
	p := newProcess(t, newDatabase(t), Config{SafetyInterval: never, PollInterval: never})
	var all []*watcher[*wrapperspb.StringValue]
	for i := range 2*maxRead + 1 {
		all = append(all, p.join(fmt.Sprint(i)))
	}
	p.run(t, p.hub.Follow)
	for _, w := range all {
		if got := <-w.mailbox; !errors.Is(got.err, ErrNotFound) {
			t.Fatalf("got %v", got)
		}
	}
	if n := p.reads.Load(); n != 3 {
		t.Errorf("got %d statements, want 3", n)
	}
}

func TestTheBellNamesUpToMaxKeys(t *testing.T) {
	t.Parallel()
	b := newBell()
	for i := range maxKeys {
		b.ring(change{"people", fmt.Sprint(i)})
	}
	b.ring(change{"people", "0"}) // again
	if keys, some := b.take(); !some || len(keys["people"]) != maxKeys {
		t.Errorf("got %d keys, want %d", len(keys["people"]), maxKeys)
	}
	for i := range maxKeys + 1 {
		b.ring(change{"people", fmt.Sprint(i)})
	}
	if keys, some := b.take(); !some || len(keys) != 0 {
		t.Errorf("got %d keys, want none, which means all", len(keys["people"]))
	}
	if _, some := b.take(); some {
		t.Error("changes are left in the bell")
	}
}

func TestPayloadsFitAndNameEveryKey(t *testing.T) {
	t.Parallel()
	keys := map[string][]string{}
	want := map[change]bool{}
	for _, topic := range []string{"people", "things"} {
		for i := range maxKeys {
			key := fmt.Sprintf("%0*d\"\x01é", i%50, i)
			keys[topic] = append(keys[topic], key)
			want[change{topic, key}] = true
		}
	}
	packed := payloads("self", keys)
	for _, payload := range packed {
		if len(payload) > maxPayload {
			t.Errorf("payload has %d bytes, want at most %d", len(payload), maxPayload)
		}
		var got news
		err := json.Unmarshal([]byte(payload), &got)
		if err != nil || got.From != "self" || got.Topic == "" || len(got.Keys) == 0 {
			t.Fatalf("got payload %s, error %v", payload, err)
		}
		for _, key := range got.Keys {
			delete(want, change{got.Topic, key})
		}
	}
	if len(want) != 0 || len(packed) > 60 {
		t.Errorf("%d keys are missing from %d payloads", len(want), len(packed))
	}
}

func TestTopicNamesAreUnique(t *testing.T) {
	t.Parallel()
	p := newProcess(t, newDatabase(t), Config{})
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	NewTopic(p.hub, "probe", p.read)
}
