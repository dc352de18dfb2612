package ops

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/inbox"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
)

// MessageTrace is how one message travelled, as far as it is known.
type MessageTrace struct {
	// MessageID is the ID under which the message was published, or would be if it is in no log.
	MessageID string
	// ScheduledID is the ID that a scheduled message had before it entered the log, if Trace was asked for that one.
	ScheduledID string
	// Scheduled is the message while it waits for its time, otherwise nil.
	Scheduled *Scheduled
	// Log contains its rows in the outbox. It is empty after the retention, or if another service sent the message.
	Log []Logged
	// Groups contains the consumer groups that took it.
	Groups []inbox.MessageStatus
	// Letters contains its dead letters, including resolved ones.
	Letters []deadletter.Stored
	// Audit contains what operators did with the dead letters, by their IDs.
	Audit map[int64][]deadletter.Record
}

// Trace collects what is known of a message. messageID is the ID under which it was published or scheduled.
func Trace(ctx context.Context, db *pgxpool.Pool, messageID string) (t MessageTrace, err error) {
	if messageID == "" {
		return t, errors.New("the message ID is empty")
	}
	t.MessageID = messageID
	if id, invalid := uuid.Parse(messageID); invalid == nil {
		if err := t.find(ctx, db, id); err != nil {
			return t, err
		}
	}
	if t.Groups, err = inbox.StatusesOf(ctx, db, t.MessageID); err != nil {
		return t, err
	}
	t.Letters, err = deadletter.List(ctx, db, deadletter.Filter{MessageID: t.MessageID, Resolved: true}, 0, 100)
	t.Audit = make(map[int64][]deadletter.Record, len(t.Letters))
	for _, letter := range t.Letters {
		if err == nil { // an open one may have been discarded and reopened
			t.Audit[letter.ID], err = deadletter.Audit(ctx, db, letter.ID)
		}
	}
	return t, err
}

// find finds the message with this ID among those that wait for their time and in the log. If it has entered the log
// under another ID, find sets both.
func (t *MessageTrace) find(ctx context.Context, db *pgxpool.Pool, id uuid.UUID) (err error) {
	if t.Scheduled, err = findScheduled(ctx, db, id); err != nil || t.Scheduled != nil {
		return err
	}
	if t.Log, err = FindInLog(ctx, db, id); err != nil {
		return err
	}
	var published string
	if len(t.Log) > 0 {
		published = t.Log[0].ID.String()
	} else if published, err = letterID(ctx, db, id); err != nil {
		return err
	}
	if published != id.String() {
		t.MessageID, t.ScheduledID = published, id.String()
	}
	return nil
}

// Known reports whether anything is known of the message.
func (t MessageTrace) Known() bool {
	return t.Scheduled != nil || len(t.Log)+len(t.Groups)+len(t.Letters) > 0
}

// Step is something that happened to a message, or has yet to happen.
type Step struct {
	// At is when it happened; nil if it has not happened or its time is not recorded.
	At *time.Time `json:"at,omitempty"`
	// Where is outbox, relay, or the consumer group.
	Where string    `json:"where"`
	What  string    `json:"what"`
	order time.Time // At, or the time of the step before it
}

func at(when time.Time, where, what string) Step { return Step{&when, where, what, when} }

// after returns a step whose time is not known, but which step it follows. No other step has the same order, because
// Postgres' times are whole microseconds.
func after(when time.Time, where, what string) Step {
	return Step{nil, where, what, when.Add(time.Nanosecond)}
}

// now returns a step for the current state.
func now(where, what string) Step { return Step{Where: where, What: what, order: endOfTime} }

var endOfTime = time.Unix(1<<40, 0)

// Steps returns the steps in the order of time, and the current state last. groups are all consumer groups: if one of
// them consumes the message and has not received it, that is also a step.
func (t MessageTrace) Steps(groups []Group) []Step {
	steps := t.scheduleSteps()
	for _, entry := range t.Log {
		steps = append(steps, at(entry.CreatedAt, "outbox",
			fmt.Sprintf("inserted by transaction %d, shard %d", entry.TransactionID, entry.Shard)))
		switch {
		case !entry.Delivered:
			steps = append(steps, now(deadletter.Relay, "waits to be published"))
		// If the relay has a dead letter of it, it may be parked and not published.
		case !slices.ContainsFunc(t.Letters, func(l deadletter.Stored) bool { return l.Consumer == "" }):
			what := "published"
			if !slices.ContainsFunc(groups, func(g Group) bool { return slices.Contains(g.Types, entry.Type) }) {
				what += "; no group of this service handles " + entry.Type
			}
			steps = append(steps, after(entry.CreatedAt, deadletter.Relay, what))
		}
	}
	for _, status := range t.Groups {
		steps = append(steps, at(status.ReceivedAt, status.Consumer, "received"))
		steps = append(steps, t.groupSteps(status)...)
	}
	for _, letter := range t.Letters {
		steps = append(steps, t.letterSteps(letter)...)
	}
	steps = append(steps, t.missing(groups)...)
	slices.SortStableFunc(steps, func(a, b Step) int { return a.order.Compare(b.order) })
	return steps
}

// scheduleSteps returns the steps of a message that waits for its time or has waited for it.
func (t MessageTrace) scheduleSteps() []Step {
	switch {
	case t.Scheduled != nil:
		return []Step{at(t.Scheduled.CreatedAt, "outbox", "scheduled"),
			now("outbox", "waits for its time, due "+t.Scheduled.DueAt.UTC().Format(time.RFC3339))}
	case t.ScheduledID != "":
		made := time.Unix(uuid.MustParse(t.ScheduledID).Time().UnixTime())
		return []Step{at(made, "outbox", "scheduled as "+t.ScheduledID)}
	}
	return nil
}

// groupSteps returns the state of a message in a group that has taken it. If the inbox wrote a dead letter for a
// message that it had taken, the effect was not committed. Dead letters for undelivered messages and for copies outside
// the window say nothing about the effect.
func (t MessageTrace) groupSteps(status inbox.MessageStatus) []Step {
	copies := ""
	if status.Copies > 1 {
		copies = fmt.Sprintf("; %d copies arrived, %d absorbed", status.Copies, status.Copies-1)
	}
	switch {
	case status.Waits && (status.Attempts == 0 || status.DueAt == nil):
		return []Step{now(status.Consumer, "waits for its turn"+copies)}
	case status.Waits:
		return []Step{now(status.Consumer,
			fmt.Sprintf("waits for a retry, due %s; %d %s failed, the last one with: %s%s",
				status.DueAt.UTC().Format(time.RFC3339), status.Attempts, plural(status.Attempts, "attempt", "attempts"),
				status.LastError, copies))}
	}
	since := status.ReceivedAt
	for _, letter := range t.Letters {
		switch {
		case letter.Consumer != status.Consumer || !slices.Contains(neverApplied, letter.Reason):
		case letter.Resolution == deadletter.Redriven || letter.Resolution == deadletter.Duplicate:
			for _, record := range t.Audit[letter.ID] {
				since = record.At // another dead letter may follow
			}
		default:
			return nil // letterSteps covers it
		}
	}
	return []Step{after(since, status.Consumer, "applied"+copies)}
}

// letterSteps returns the steps of a dead letter and what became of it.
func (t MessageTrace) letterSteps(letter deadletter.Stored) []Step {
	where := cmp.Or(letter.Consumer, deadletter.Relay)
	steps := []Step{at(letter.DeadAt, where, fmt.Sprintf("dead letter %d, %s after %d %s: %s",
		letter.ID, letter.Reason, letter.Attempts, plural(letter.Attempts, "attempt", "attempts"), letter.Error))}
	for _, record := range t.Audit[letter.ID] {
		what := fmt.Sprintf("dead letter %d %s by %s: %s", letter.ID, record.Resolution, record.Actor, record.Reason)
		if record.Detail != "" {
			what += " (" + record.Detail + ")"
		}
		steps = append(steps, at(record.At, where, what))
	}
	if letter.Resolution == "" {
		steps = append(steps, now(where, fmt.Sprintf("dead letter %d is open", letter.ID)))
	}
	return steps
}

// missing returns a step for each group that consumes the message and has no trace of it.
func (t MessageTrace) missing(groups []Group) (steps []Step) {
	if len(t.Log) == 0 || !t.Log[0].Delivered {
		return nil
	}
	for _, group := range groups {
		took := slices.ContainsFunc(t.Groups, func(p inbox.MessageStatus) bool { return p.Consumer == group.Name })
		dead := slices.ContainsFunc(t.Letters, func(l deadletter.Stored) bool { return l.Consumer == group.Name })
		if slices.Contains(group.Types, t.Log[0].Type) && !took && !dead {
			steps = append(steps, now(group.Name, "has not received it"))
		}
	}
	return steps
}

func plural(n int, singular, plural string) string {
	if n == 1 {
		return singular
	}
	return plural
}
