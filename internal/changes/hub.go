// Package changes lets any number of watchers follow the present state of things, at a cost to the database that does not depend on how
// many they are.
//
// # How
//
// Who changes a thing says so in its transaction (Topic.Touch). After the commit the process rings: it wakes its own watchers, and tells the other
// processes by a NOTIFY that many changes share, outside of any business transaction, where it would take a lock over the whole cluster. A process
// that has watchers listens on one connection. For each topic it collects what was touched and is watched, reads all of that in one
// statement, and hands each state to everyone who watches it. Who begins to watch is served by the same statement.
//
// # What it guarantees
//
// A watcher gets the state that was present after it began to watch, and in the end the last one, whatever is lost on the way: a ring is only a hint.
// It is lost if a process dies between its commit and the ring, or if the listening connection breaks; so everything watched is read again when that
// connection is back, and every few seconds besides. Without a direct connection, behind a transaction-mode pooler, that is all there is.
//
// States never go backwards. Of several changes in quick succession a watcher may get only the last; a slow one misses those that were replaced
// while it was busy, and holds up nobody.
//
// It does not promise that a change is seen within a given time, nor that each is seen.
package changes

import (
	"cmp"
	"context"
	"fmt"
	"sync"
	"time"

	"example.com/shop/internal/session"
	"github.com/google/uuid"
)

// Config sets up a Hub.
type Config struct {
	// NotifyURL is the database to ring in, also through a pooler. ListenURL is a direct connection to the same one, or "" if there is none: then
	// changes of other processes are found by polling.
	NotifyURL, ListenURL string
	// PollInterval is how often everything watched is read without a ListenURL. Default 1 s.
	PollInterval time.Duration
	// SafetyInterval is the same with a ListenURL, for rings that were lost. Default 5 s.
	SafetyInterval time.Duration
}

// Hub carries changes between the topics of this process and those of others.
type Hub struct {
	config Config
	self   string // tells this process's notifications from those of others
	bell   bell

	mu     sync.Mutex
	topics map[string]topic
}

// topic is a Topic of any message.
type topic interface {
	// touched says that the states of keys may have changed; none means all.
	touched(keys ...string)
	// follow keeps the watchers up to date until ctx is done.
	follow(ctx context.Context, interval time.Duration)
}

// New makes a Hub without topics.
func New(config Config) *Hub {
	config.PollInterval = cmp.Or(config.PollInterval, time.Second)
	config.SafetyInterval = cmp.Or(config.SafetyInterval, 5*time.Second)
	return &Hub{config: config, self: uuid.NewString(), bell: newBell(), topics: map[string]topic{}}
}

func (h *Hub) add(name string, t topic) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, taken := h.topics[name]; taken {
		panic(fmt.Sprintf("changes: topic %s exists", name))
	}
	h.topics[name] = t
}

// Follow serves the watchers of this process until ctx is done. Topics must have been made before.
func (h *Hub) Follow(ctx context.Context) {
	interval := h.config.SafetyInterval
	if h.config.ListenURL == "" {
		interval = h.config.PollInterval
	}
	var running sync.WaitGroup
	defer running.Wait()
	for _, t := range h.all() {
		running.Go(func() { t.follow(ctx, interval) })
	}
	if h.config.ListenURL != "" {
		running.Go(func() { session.Listen(ctx, h.config.ListenURL, channel, h.hear) })
	}
}

// hear takes a notification; "" means that some may have been missed.
func (h *Hub) hear(payload string) {
	switch news := parse(payload); {
	case news.From == h.self: // its watchers were woken when it rang
	case news.Topic == "":
		for _, t := range h.all() {
			t.touched()
		}
	default:
		h.mu.Lock()
		t := h.topics[news.Topic]
		h.mu.Unlock()
		if t != nil {
			t.touched(news.Keys...)
		}
	}
}

func (h *Hub) all() (topics []topic) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, t := range h.topics {
		topics = append(topics, t)
	}
	return topics
}
