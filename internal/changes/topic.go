package changes

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/proto"
)

const (
	// roundInterval is the average time between two reads of a topic that changes constantly: 50 reads per second. A few
	// reads may follow each other at once, because a new watcher causes a read, and the change that it waits for may come
	// right after it.
	roundInterval = 20 * time.Millisecond
	roundBurst    = 5
	// failurePause is the time between two reads while the database does not answer.
	failurePause = time.Second
	// readTimeout bounds one read.
	readTimeout = 10 * time.Second
	// maxRead is the largest number of states that one statement reads. More states take more statements.
	maxRead = 5000
)

// ErrNotFound means that a watched state does not exist, or no longer exists.
var ErrNotFound = errors.New("watched state does not exist")

// Read returns the current states of keys, by key, in one statement. It omits keys that do not exist. All watchers
// share the states, so nobody may change them.
type Read[M proto.Message] func(ctx context.Context, keys []string) (map[string]M, error)

// Topic is one kind of object that can be watched. Its keys are the IDs of the objects.
type Topic[M proto.Message] struct {
	hub  *Hub
	name string
	read Read[M]
	wake flag // raised if a key is stale

	mu       sync.Mutex
	watchers map[string]map[*watcher[M]]struct{} // by key; no inner map is empty
	stale    map[string]struct{}                 // keys whose watchers may have an old state
}

// watcher is one call of Watch.
type watcher[M proto.Message] struct {
	// mailbox has room for one update. A new update replaces one that was not received. Only follow sends.
	mailbox chan update[M]
	served  bool // has been sent a state; only follow uses it
}

type update[M proto.Message] struct {
	state M
	err   error
}

// NewTopic adds a Topic to a hub. Its name must be the same in all processes and unique in each. NewTopic panics if the
// hub already has a topic of that name.
func NewTopic[M proto.Message](hub *Hub, name string, read Read[M]) *Topic[M] {
	t := &Topic[M]{
		hub: hub, name: name, read: read, wake: newFlag(),
		watchers: map[string]map[*watcher[M]]struct{}{}, stale: map[string]struct{}{},
	}
	hub.add(name, t)
	return t
}

// Touch declares that tx changes the states of keys. postgres.Transact must have begun tx.
func (t *Topic[M]) Touch(tx pgx.Tx, keys ...string) {
	if len(keys) == 0 {
		return // for touched and ring, no keys would mean all
	}
	changed := make([]change, 0, len(keys))
	for _, key := range keys {
		changed = append(changed, change{t.name, key})
	}
	postgres.AfterCommit(tx, func() {
		t.touched(keys...)
		t.hub.bell.ring(changed...)
	})
}

// Watch yields the current state of a key, and then later states, until ctx is done or the caller stops. It ends with
// an error: that of ctx, ErrNotFound, or that of the read if it cannot get a first state. It waits out later failures
// of the database. It yields only while Hub.Follow runs. The states are shared and must not be changed.
func (t *Topic[M]) Watch(ctx context.Context, key string) iter.Seq2[M, error] {
	return func(yield func(M, error) bool) {
		w := t.join(key)
		defer t.leave(key, w)
		var last, none M
		for first := true; ; {
			select {
			case <-ctx.Done():
				yield(none, ctx.Err())
				return
			case got := <-w.mailbox:
				if got.err != nil {
					yield(none, got.err)
					return
				}
				if !first && proto.Equal(got.state, last) {
					continue
				}
				first, last = false, got.state
				if !yield(last, nil) {
					return
				}
			}
		}
	}
}

func (t *Topic[M]) join(key string) *watcher[M] {
	w := &watcher[M]{mailbox: make(chan update[M], 1)}
	t.mu.Lock()
	if t.watchers[key] == nil {
		t.watchers[key] = map[*watcher[M]]struct{}{}
	}
	t.watchers[key][w] = struct{}{}
	t.mu.Unlock()
	t.touched(key)
	return w
}

func (t *Topic[M]) leave(key string, w *watcher[M]) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.watchers[key], w)
	if len(t.watchers[key]) == 0 {
		delete(t.watchers, key)
		delete(t.stale, key)
	}
}

// touched implements topic.
func (t *Topic[M]) touched(keys ...string) {
	t.mu.Lock()
	for _, key := range keys {
		if t.watchers[key] != nil {
			t.stale[key] = struct{}{}
		}
	}
	if len(keys) == 0 {
		for key := range t.watchers {
			t.stale[key] = struct{}{}
		}
	}
	wanted := len(t.stale) > 0
	t.mu.Unlock()
	if wanted {
		t.wake.raise()
	}
}

// follow implements topic.
func (t *Topic[M]) follow(ctx context.Context, interval time.Duration) {
	safety := time.NewTicker(interval)
	defer safety.Stop()
	pace := rate.NewLimiter(rate.Every(roundInterval), roundBurst)
	for {
		select {
		case <-ctx.Done():
			return
		case <-safety.C:
			t.touched()
		case <-t.wake:
		}
		if pace.Wait(ctx) != nil {
			return
		}
		if err := t.round(ctx); err != nil && ctx.Err() == nil {
			slog.WarnContext(ctx, "watched states not read", "topic", t.name, "error", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(failurePause):
			}
		}
	}
}

// round reads the stale states and sends them to their watchers. A watcher that joins meanwhile waits for the next
// round: this round's statement may have begun before, and may return a state that is older than the one its caller
// has seen.
func (t *Topic[M]) round(ctx context.Context) error {
	waiting := t.take()
	if len(waiting) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	states, err := t.read(ctx, slices.Collect(maps.Keys(waiting)))
	for key, watchers := range waiting {
		state, found := states[key]
		for _, w := range watchers {
			switch {
			case err != nil && w.served: // gets the next state when the database is back
			case err != nil:
				w.put(update[M]{err: err})
			case !found:
				w.put(update[M]{err: ErrNotFound})
			default:
				w.served = true
				w.put(update[M]{state: state})
			}
		}
	}
	if err != nil {
		t.touched(slices.Collect(maps.Keys(waiting))...)
	}
	return err
}

// take returns up to maxRead stale keys with their watchers, and leaves the rest for the next round.
func (t *Topic[M]) take() map[string][]*watcher[M] {
	t.mu.Lock()
	defer t.mu.Unlock()
	waiting := make(map[string][]*watcher[M], min(len(t.stale), maxRead))
	for key := range t.stale {
		if len(waiting) == maxRead {
			t.wake.raise()
			break
		}
		delete(t.stale, key)
		waiting[key] = slices.Collect(maps.Keys(t.watchers[key]))
	}
	return waiting
}

// put sends an update to the watcher, and replaces one that the watcher has not received.
func (w *watcher[M]) put(u update[M]) {
	select {
	case <-w.mailbox:
	default:
	}
	w.mailbox <- u
}
