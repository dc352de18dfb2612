package inbox

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"
)

// TestAnyScheduleAppliesEachMessageOnceInOrder lets rapid choose redeliveries, failures of handlers, interruptions of
// batches, messages that operators bury, and the times of retries. In the end each message is applied exactly once or
// dead, and the effects of a key are in the order in which its messages first arrived.
func TestAnyScheduleAppliesEachMessageOnceInOrder(t *testing.T) {
	t.Parallel()
	db, schedules := setup(t).db, 0
	rapid.Check(t, func(r *rapid.T) {
		schedules++
		m := newModel(r, newBundle(db, fmt.Sprintf("schedule %d", schedules)))
		r.Repeat(map[string]func(*rapid.T){
			"deliver":   m.deliver,
			"redeliver": m.redeliver,
			"interrupt": m.interrupt,
			"retry":     func(*rapid.T) { retryOne(r, m.box) },
			"restart":   func(*rapid.T) { m.box = m.bundle.inbox(eager) },
			"bury":      m.bury,
			"":          func(r *rapid.T) { m.bundle.wantHeads(r) },
		})
		m.finish(r)
		m.check(r)
	})
}

// forever is more failures than a message is allowed.
const forever = 1 << 20

// model is one queue and its consumer.
type model struct {
	bundle *bundle
	box    *Inbox
	queue  []messaging.Delivery
	fate   []int // how often the handler fails on each message; -1 means permanently
	next   int   // the first message that was never delivered
	buried []string
}

func newModel(r *rapid.T, b *bundle) *model {
	m := &model{bundle: b, box: b.inbox(eager)}
	keys := rapid.SampledFrom([]string{"", "a", "a", "b"})
	fates := rapid.SampledFrom([]int{0, 0, 0, 1, 3, forever, -1})
	for i := range rapid.IntRange(1, 12).Draw(r, "messages") {
		text, left := fmt.Sprint(i), fates.Draw(r, "failures")
		m.queue = append(m.queue, probe(keys.Draw(r, "key"), text))
		m.fate = append(m.fate, left)
		b.on(text, func(context.Context, pgx.Tx) error {
			switch {
			case left < 0:
				return messaging.Permanent(errProbe)
			case left > 0:
				left--
				return errProbe
			}
			return nil
		})
	}
	return m
}

// deliver passes the next few messages, after some that are redelivered because their ack was lost.
func (m *model) deliver(r *rapid.T) {
	from := max(0, m.next-rapid.IntRange(0, 3).Draw(r, "again"))
	m.next = min(len(m.queue), m.next+rapid.IntRange(1, 4).Draw(r, "new"))
	process(r, m.box, m.queue[from:m.next]...)
}

// redeliver passes copies of earlier messages in any order, as if a relay had published them twice.
func (m *model) redeliver(r *rapid.T) {
	if m.next == 0 {
		return
	}
	process(r, m.box, rapid.SliceOfN(rapid.SampledFrom(m.queue[:m.next]), 1, 4).Draw(r, "copies")...)
}

// interrupt passes the next few messages and cancels the context in the handler of one. The messages are not acked, so
// they are redelivered.
func (m *model) interrupt(r *rapid.T) {
	end := min(len(m.queue), m.next+rapid.IntRange(1, 4).Draw(r, "new"))
	if end == m.next {
		return
	}
	victim := fmt.Sprint(rapid.IntRange(m.next, end-1).Draw(r, "victim"))
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	do := m.bundle.acts[victim]
	m.bundle.on(victim, func(ctx context.Context, tx pgx.Tx) error { cancel(); return do(ctx, tx) })
	err := m.box.Process(ctx, m.queue[m.next:end])
	m.bundle.on(victim, do)
	if err == nil && m.bundle.ran(victim) > 0 && ctx.Err() != nil {
		r.Fatal("no error although the context ended in the handler")
	}
	if err == nil {
		m.next = end // the victim waited behind another and was not run
	}
}

// bury moves the head of a key, or all its waiting messages, to dead_letter.
func (m *model) bury(r *rapid.T) {
	key, whole := rapid.SampledFrom([]string{"a", "b"}).Draw(r, "key"), rapid.Bool().Draw(r, "whole")
	err := postgres.Transact(r.Context(), m.bundle.db, func(tx pgx.Tx) error {
		ids, err := Bury(r.Context(), tx, m.bundle.group.name, key, whole, "probe")
		m.buried = append(m.buried, ids...)
		return err
	})
	if err != nil {
		r.Fatalf("bury: %v", err)
	}
}

func (m *model) finish(r *rapid.T) {
	process(r, m.box, m.queue[m.next:]...)
	retryAll(r, m.box)
}

func (m *model) check(r *rapid.T) {
	m.bundle.wantWaiting(r)
	effects := m.bundle.list(r, listEffectsSQL)
	dead := m.bundle.list(r, `SELECT headers ->> 'probe' FROM dead_letter WHERE consumer = $1`)
	byKey := map[string][]string{}
	for i, d := range m.queue {
		text := fmt.Sprint(i)
		applied, died := slices.Contains(effects, text), slices.Contains(dead, text)
		if applied == died {
			r.Errorf("message %s: applied %t, dead %t", text, applied, died)
		}
		if slices.Contains(m.buried, d.ID) {
			if !died {
				r.Errorf("message %s is buried but not dead", text)
			}
			continue
		}
		if (m.fate[i] == 0 && died) || ((m.fate[i] < 0 || m.fate[i] == forever) && applied) {
			r.Errorf("message %s that fails %d times: applied %t", text, m.fate[i], applied)
		}
		if applied {
			byKey[d.Key] = append(byKey[d.Key], text)
		}
	}
	if len(effects)+len(dead) != len(m.queue) {
		r.Errorf("%d effects and %d dead letters of %d messages: %q, %q",
			len(effects), len(dead), len(m.queue), effects, dead)
	}
	for key, want := range byKey {
		got := slices.DeleteFunc(slices.Clone(effects), func(text string) bool { return !slices.Contains(want, text) })
		if key != "" && !slices.Equal(got, want) {
			r.Errorf("effects of key %s are %q, want %q", key, got, want)
		}
	}
}
