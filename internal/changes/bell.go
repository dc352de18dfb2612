package changes

import (
	"context"
	"encoding/json"
	"log/slog"
	"sync"
	"time"

	"example.com/shop/internal/session"
	"github.com/jackc/pgx/v5"
)

// channel is the Postgres notification channel of changes.
const channel = "changes"

const (
	// notifyInterval is the least time between two notifications of one process. Changes within it share one.
	notifyInterval = 5 * time.Millisecond
	// notifyTimeout bounds one notification.
	notifyTimeout = 2 * time.Second
	// maxKeys is how many changes one round of notifications names. If there are more, it says that everything may have changed: that costs each
	// process one reading of what it watches, which is less than hearing of everything else.
	maxKeys = 2000
	// maxPayload is the size of a notification. Postgres takes less than 8000 bytes.
	maxPayload = 7900
)

// bell collects what is to be told to other processes.
type bell struct {
	mu      sync.Mutex
	pending map[change]struct{}
	all     bool // more than maxKeys, or a notification may be lost
	rung    flag
}

type change struct{ topic, key string }

// flag is raised or not. It has one taker, who takes it down before looking for what it was raised for.
type flag chan struct{}

func newFlag() flag { return make(flag, 1) }

func (f flag) raise() {
	select {
	case f <- struct{}{}:
	default: // it is up
	}
}

func newBell() bell {
	return bell{pending: map[change]struct{}{}, rung: newFlag()}
}

func (b *bell) ring(changed ...change) {
	b.mu.Lock()
	for _, one := range changed {
		b.pending[one] = struct{}{}
	}
	if len(changed) == 0 || len(b.pending) > maxKeys {
		b.all = true
	}
	b.mu.Unlock()
	b.rung.raise()
}

// take empties the bell. It returns the keys by topic, none of which means everything, and whether there is anything to tell.
func (b *bell) take() (keys map[string][]string, some bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	some = b.all || len(b.pending) > 0
	keys = map[string][]string{}
	if !b.all {
		for one := range b.pending {
			keys[one.topic] = append(keys[one.topic], one.key)
		}
	}
	clear(b.pending)
	b.all = false
	return keys, some
}

// Ring tells the other processes what was touched here, until ctx is done; what was touched before that is told even then. It connects when there is
// something to tell for the first time. Where no Ring runs, others find changes at their safety interval.
func (h *Hub) Ring(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-h.bell.rung:
		h.bell.rung.raise() // for the loop
	}
	session.Keep(ctx, h.config.NotifyURL, "ring "+channel, func(conn *pgx.Conn) error { return h.ring(ctx, conn) })
	select {
	case <-h.bell.rung:
	default:
		return
	}
	// The last word of the process, for which it may never have had a connection.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), notifyTimeout)
	defer cancel()
	err := session.With(ctx, h.config.NotifyURL, func(conn *pgx.Conn) error { return h.notify(ctx, conn) })
	if err != nil {
		slog.WarnContext(ctx, "last changes not told to other processes", "error", err)
	}
}

func (h *Hub) ring(ctx context.Context, conn *pgx.Conn) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-h.bell.rung:
		}
		if err := h.notify(ctx, conn); err != nil {
			h.bell.ring() // what was taken is gone
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(notifyInterval):
		}
	}
}

// notify sends what the bell has collected in one statement. The end of ctx does not break it off.
func (h *Hub) notify(ctx context.Context, conn *pgx.Conn) error {
	keys, some := h.bell.take()
	if !some {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), notifyTimeout)
	defer cancel()
	_, err := conn.Exec(ctx, `SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS payload`, channel, payloads(h.self, keys))
	return err
}

// news is the payload of a notification. Without a topic, everything may have changed; without keys, everything of the topic.
type news struct {
	From  string   `json:"from"`
	Topic string   `json:"topic,omitempty"`
	Keys  []string `json:"keys,omitempty"`
}

func parse(payload string) (n news) {
	if json.Unmarshal([]byte(payload), &n) != nil {
		return news{} // somebody else's, or of another version
	}
	return n
}

func (n news) String() string {
	text, _ := json.Marshal(n) // strings always can be
	return string(text)
}

// payloads packs keys into as few notifications as they fit in.
func payloads(self string, keys map[string][]string) (all []string) {
	if len(keys) == 0 {
		return []string{news{From: self}.String()}
	}
	for topic, keys := range keys {
		frame := len(news{From: self, Topic: topic, Keys: []string{""}}.String())
		size, one := frame, news{From: self, Topic: topic}
		for _, key := range keys {
			text, _ := json.Marshal(key)
			if size += len(text) + 1; size > maxPayload {
				all = append(all, one.String())
				size, one.Keys = frame+len(text)+1, nil
			}
			one.Keys = append(one.Keys, key)
		}
		all = append(all, one.String())
	}
	return all
}
