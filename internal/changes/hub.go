// Package changes lets any number of watchers follow the current state of objects. The cost to the database does not
// depend on the number of watchers.
//
// # How it works
//
// A transaction that changes an object calls Topic.Touch. After the commit the process rings: it wakes its own
// watchers and sends a NOTIFY to the other processes. Many changes share one NOTIFY. It is sent outside of business
// transactions, because in them it would take a lock on the whole cluster. A process with watchers listens on one
// connection. For each topic it collects the keys that were touched and are watched, reads their states in one
// statement, and passes each state to all of its watchers. The same statement serves new watchers.
//
// # What it guarantees
//
// A watcher gets a state that was current after it began to watch, and eventually the last state, even if rings are
// lost. A ring is only a hint. It is lost if a process dies between its commit and the ring, or if the listening
// connection breaks. So the process reads everything it watches again when that connection is back, and every few
// seconds besides. Without a direct connection, behind a pooler in transaction mode, only this polling is left.
//
// States never go backwards. After several changes in quick succession, a watcher may get only the last state. A slow
// watcher misses the states that were replaced while it was busy, and delays no other watcher.
//
// The package does not guarantee that a watcher sees a change within a given time, or that it sees every change.
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
	// NotifyURL is the database to ring in, directly or through a pooler. ListenURL is a direct connection to the same
	// database. Without it, the hub finds changes of other processes by polling.
	NotifyURL, ListenURL string
	// PollInterval is the time between two reads of everything watched, without a ListenURL. Default 1 s.
	PollInterval time.Duration
	// SafetyInterval is the same with a ListenURL, in case rings are lost. Default 5 s.
	SafetyInterval time.Duration
}

// Hub passes changes between the topics of this process and those of other processes.
type Hub struct {
	config Config
	self   string // marks this process's own notifications
	bell   bell

	mu     sync.Mutex
	topics map[string]topic
}

// topic is a Topic of any message.
type topic interface {
	// touched marks the states of keys as possibly changed. Without keys, it marks all states.
	touched(keys ...string)
	// follow updates the watchers until ctx is done.
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
		panic(fmt.Sprintf("changes: topic %s exists already", name))
	}
	h.topics[name] = t
}

// Follow serves the watchers of this process until ctx is done. All topics must have been added before.
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

// hear handles a notification. An empty payload means that notifications may have been missed.
func (h *Hub) hear(payload string) {
	switch news := parse(payload); {
	case news.From == h.self: // Touch has woken our watchers already
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
