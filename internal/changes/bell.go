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
	// notifyInterval is the least time between two notifications of one process. Changes in between share one.
	notifyInterval = 5 * time.Millisecond
	// notifyTimeout bounds one notification.
	notifyTimeout = 2 * time.Second
	// maxKeys is the largest number of changes that one round of notifications names. If there are more, the notification
	// says that everything may have changed. Each process then reads everything it watches once, which costs less than
	// receiving all the names.
	maxKeys = 2000
	// maxPayload is the largest payload of a notification, in bytes. Postgres accepts less than 8000.
	maxPayload = 7900
)

// bell collects changes to send to other processes.
type bell struct {
	mu      sync.Mutex
	pending map[change]struct{}
	all     bool // more than maxKeys, or a notification may be lost
	rung    flag
}

type change struct{ topic, key string }

// flag is raised or not. One goroutine waits for it, and lowers it before it looks for work.
type flag chan struct{}

func newFlag() flag { return make(flag, 1) }

func (f flag) raise() {
	select {
	case f <- struct{}{}:
	default: // raised already
	}
}

func newBell() bell {
	return bell{pending: map[change]struct{}{}, rung: newFlag()}
}

func (b *bell) ring(changed ...change) {
	b.mu.Lock()
	for _, c := range changed {
		b.pending[c] = struct{}{}
	}
	if len(changed) == 0 || len(b.pending) > maxKeys {
		b.all = true
	}
	b.mu.Unlock()
	b.rung.raise()
}

// take empties the bell. It returns whether there are changes, and their keys by topic. No keys mean that everything
// may have changed.
func (b *bell) take() (keys map[string][]string, some bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	some = b.all || len(b.pending) > 0
	keys = map[string][]string{}
	if !b.all {
		for c := range b.pending {
			keys[c.topic] = append(keys[c.topic], c.key)
		}
	}
	clear(b.pending)
	b.all = false
	return keys, some
}

// Ring notifies other processes of the changes of this one until ctx is done. Before it returns, it sends the changes
// that were made by then. It connects at the first change. Without Ring, other processes find changes at their safety
// interval.
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
	// Send the last changes. There may have been no connection until now.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), notifyTimeout)
	defer cancel()
	err := session.With(ctx, h.config.NotifyURL, func(conn *pgx.Conn) error { return h.notify(ctx, conn) })
	if err != nil {
		slog.WarnContext(ctx, "last changes not sent to other processes", "error", err)
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
			h.bell.ring() // the keys that notify took are lost
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(notifyInterval):
		}
	}
}

// notify sends the changes of the bell in one statement, even if ctx is done.
func (h *Hub) notify(ctx context.Context, conn *pgx.Conn) error {
	keys, some := h.bell.take()
	if !some {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), notifyTimeout)
	defer cancel()
	_, err := conn.Exec(ctx, `SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS payload`,
		channel, payloads(h.self, keys))
	return err
}

// news is the payload of a notification. Without a topic, everything may have changed. Without keys, everything in the
// topic may have changed.
type news struct {
	From  string   `json:"from"`
	Topic string   `json:"topic,omitempty"`
	Keys  []string `json:"keys,omitempty"`
}

func parse(payload string) (n news) {
	if json.Unmarshal([]byte(payload), &n) != nil {
		return news{} // from another program or another version
	}
	return n
}

func (n news) String() string {
	text, _ := json.Marshal(n) // cannot fail: news has only strings
	return string(text)
}

// payloads packs keys into as few notifications as possible.
func payloads(self string, keys map[string][]string) (all []string) {
	if len(keys) == 0 {
		return []string{news{From: self}.String()}
	}
	for topic, keys := range keys {
		frame := len(news{From: self, Topic: topic, Keys: []string{""}}.String())
		size, payload := frame, news{From: self, Topic: topic}
		for _, key := range keys {
			text, _ := json.Marshal(key)
			if size += len(text) + 1; size > maxPayload {
				all = append(all, payload.String())
				size, payload.Keys = frame+len(text)+1, nil
			}
			payload.Keys = append(payload.Keys, key)
		}
		all = append(all, payload.String())
	}
	return all
}
