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
	// roundInterval is the time between two readings of a topic that changes all the time: 50 times a second. A few may follow each other at once:
	// who begins to watch causes one, and the change that it waits for may be right behind.
	roundInterval = 20 * time.Millisecond
	roundBurst    = 5
	// failurePause is the time between two readings while the database does not answer.
	failurePause = time.Second
	// readTimeout bounds one reading.
	readTimeout = 10 * time.Second
	// maxRead is how many states are read by one statement. More are read by as many as it takes.
	maxRead = 5000
)

// ErrNotFound means that what is watched does not exist, or not any more.
var ErrNotFound = errors.New("watched state does not exist")

// Read returns the present states of keys, by key, in one statement. What does not exist is left out. The states belong to all
// watchers: nobody may change them.
type Read[M proto.Message] func(ctx context.Context, keys []string) (map[string]M, error)

// Topic is one kind of thing that can be watched. Its keys are their IDs.
type Topic[M proto.Message] struct {
	hub  *Hub
	name string
	read Read[M]
	wake flag // something is stale

	mu       sync.Mutex
	watchers map[string]map[*watcher[M]]struct{} // by key; none of them empty
	stale    map[string]struct{}                 // keys with watchers whose state may not be the one that they have
}

// watcher is one call of Watch.
type watcher[M proto.Message] struct {
	// mail has room for one: what was not looked at is replaced by what came later. Only the topic's follow puts something in.
	mail   chan letter[M]
	served bool // has had a state; follow's own
}

type letter[M proto.Message] struct {
	state M
	err   error
}

// NewTopic makes a Topic. Its name is the same in all processes, and unique in each: it panics if the hub has it.
func NewTopic[M proto.Message](hub *Hub, name string, read Read[M]) *Topic[M] {
	t := &Topic[M]{
		hub: hub, name: name, read: read, wake: newFlag(),
		watchers: map[string]map[*watcher[M]]struct{}{}, stale: map[string]struct{}{},
	}
	hub.add(name, t)
	return t
}

// Touch says that tx, which postgres.Transact must have begun, changes what is watched under keys.
func (t *Topic[M]) Touch(tx pgx.Tx, keys ...string) {
	if len(keys) == 0 {
		return // further on that means everything
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

// Watch yields the state of a key as it is now, and then each other one, until ctx is done or the caller has seen enough. It ends with an
// error: that of ctx, ErrNotFound, or that of the reading if there is no first state to give. Later failures of the database are waited out.
// It yields only while the hub follows. The states are shared: they must not be changed.
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
			case got := <-w.mail:
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
	w := &watcher[M]{mail: make(chan letter[M], 1)}
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

// round reads what is stale and hands it out. Who joins meanwhile waits for the next round: this one's statement may have begun before, and
// what it shows be older than what the caller knows.
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
			case err != nil && w.served: // has a state, and gets the next when the database is back
			case err != nil:
				w.put(letter[M]{err: err})
			case !found:
				w.put(letter[M]{err: ErrNotFound})
			default:
				w.served = true
				w.put(letter[M]{state: state})
			}
		}
	}
	if err != nil {
		t.touched(slices.Collect(maps.Keys(waiting))...)
	}
	return err
}

// take returns stale keys with their watchers, and remembers the rest for the next round.
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

// put replaces what the watcher has not looked at.
func (w *watcher[M]) put(l letter[M]) {
	select {
	case <-w.mail:
	default:
	}
	w.mail <- l
}
