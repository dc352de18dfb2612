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

// MessageTrace is the way of one message as far as it is known.
type MessageTrace struct {
	// Log is where it stands in the outbox; empty past the retention, or if another service sent it.
	Log []Logged
	// Groups are the consumer groups that took it.
	Groups []inbox.MessageStatus
	// Letters are its dead letters, resolved ones included.
	Letters []deadletter.Stored
	// Audit is what was done about the letters, by their IDs.
	Audit map[int64][]deadletter.Record
}

// Trace follows a message.
func Trace(ctx context.Context, db *pgxpool.Pool, messageID string) (j MessageTrace, err error) {
	if messageID == "" {
		return j, errors.New("the message ID is empty")
	}
	if id, invalid := uuid.Parse(messageID); invalid == nil {
		if j.Log, err = FindInLog(ctx, db, id); err != nil {
			return j, err
		}
	}
	if j.Groups, err = inbox.StatusesOf(ctx, db, messageID); err != nil {
		return j, err
	}
	j.Letters, err = deadletter.List(ctx, db, deadletter.Filter{MessageID: messageID, Resolved: true}, 0, 100)
	j.Audit = make(map[int64][]deadletter.Record, len(j.Letters))
	for _, letter := range j.Letters {
		if err == nil { // an open one may have been discarded and reopened
			j.Audit[letter.ID], err = deadletter.Audit(ctx, db, letter.ID)
		}
	}
	return j, err
}

// Known tells whether anything holds the message.
func (j MessageTrace) Known() bool { return len(j.Log)+len(j.Groups)+len(j.Letters) > 0 }

// Group is a consumer group, and the types that it wants.
type Group struct {
	Name  string
	Types []string
}

// Step is one thing that happened to a message, or has yet to happen.
type Step struct {
	// At is when; nil for what has not happened, or whose time nobody keeps.
	At *time.Time `json:"at,omitempty"`
	// Where is outbox, relay, or the consumer group.
	Where string    `json:"where"`
	What  string    `json:"what"`
	order time.Time // At, or the time of what it follows
}

func at(when time.Time, where, what string) Step { return Step{&when, where, what, when} }

// behind is a step whose time is not known, but what it came after; no other step has that order, since Postgres' times
// are whole microseconds.
func behind(when time.Time, where, what string) Step {
	return Step{nil, where, what, when.Add(time.Nanosecond)}
}

// now is how things stand.
func now(where, what string) Step { return Step{Where: where, What: what, order: endOfTime} }

var endOfTime = time.Unix(1<<40, 0)

// Steps returns the journey in the order of time, and last how things stand. Groups are those that there are: that one
// wants the message and has not received it is a step, too.
func (j MessageTrace) Steps(groups []Group) []Step {
	var steps []Step
	for _, entry := range j.Log {
		steps = append(steps, at(entry.CreatedAt, "outbox",
			fmt.Sprintf("inserted by transaction %d, shard %d", entry.TransactionID, entry.Shard)))
		switch {
		case !entry.Delivered:
			steps = append(steps, now(deadletter.Relay, "waits to be published"))
		// Else it may have been parked.
		case !slices.ContainsFunc(j.Letters, func(l deadletter.Stored) bool { return l.Consumer == "" }):
			steps = append(steps, behind(entry.CreatedAt, deadletter.Relay, "published"))
		}
	}
	for _, passage := range j.Groups {
		steps = append(steps, at(passage.ReceivedAt, passage.Consumer, "received"))
		steps = append(steps, j.state(passage)...)
	}
	for _, letter := range j.Letters {
		steps = append(steps, j.death(letter)...)
	}
	steps = append(steps, j.missing(groups)...)
	slices.SortStableFunc(steps, func(a, b Step) int { return a.order.Compare(b.order) })
	return steps
}

// state is how a group stands to a message that it has taken. Letters that the inbox wrote for messages which it had
// taken say that the effect was not committed; what the broker gave up, and copies past the window, say nothing of
// that.
func (j MessageTrace) state(passage inbox.MessageStatus) []Step {
	copies := ""
	if passage.Copies > 1 {
		copies = fmt.Sprintf("; %d copies came, %d absorbed", passage.Copies, passage.Copies-1)
	}
	switch {
	case passage.Waits && (passage.Attempts == 0 || passage.DueAt == nil):
		return []Step{now(passage.Consumer, "waits for its turn"+copies)}
	case passage.Waits:
		return []Step{now(passage.Consumer, fmt.Sprintf("waits for a retry, due %s; %d %s failed, the last one "+
			"with: %s%s",
			passage.DueAt.UTC().Format(time.RFC3339), passage.Attempts, plural(passage.Attempts, "attempt", "attempts"),
			passage.LastError, copies))}
	}
	since := passage.ReceivedAt
	for _, letter := range j.Letters {
		switch {
		case letter.Consumer != passage.Consumer || !slices.Contains(owned, letter.Reason):
		case letter.Resolution == deadletter.Redriven || letter.Resolution == deadletter.Duplicate:
			for _, record := range j.Audit[letter.ID] {
				since = record.At // another letter may follow
			}
		default:
			return nil // the letter says it
		}
	}
	return []Step{behind(since, passage.Consumer, "applied"+copies)}
}

// death tells of a letter and what became of it.
func (j MessageTrace) death(letter deadletter.Stored) []Step {
	where := cmp.Or(letter.Consumer, deadletter.Relay)
	steps := []Step{at(letter.DeadAt, where, fmt.Sprintf("dead letter %d, %s after %d %s: %s",
		letter.ID, letter.Reason, letter.Attempts, plural(letter.Attempts, "attempt", "attempts"), letter.Error))}
	for _, record := range j.Audit[letter.ID] {
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

// missing are the groups that want the message and hold nothing of it.
func (j MessageTrace) missing(groups []Group) (steps []Step) {
	if len(j.Log) == 0 || !j.Log[0].Delivered {
		return nil
	}
	for _, group := range groups {
		took := slices.ContainsFunc(j.Groups, func(p inbox.MessageStatus) bool { return p.Consumer == group.Name })
		dead := slices.ContainsFunc(j.Letters, func(l deadletter.Stored) bool { return l.Consumer == group.Name })
		if slices.Contains(group.Types, j.Log[0].Type) && !took && !dead {
			steps = append(steps, now(group.Name, "has not received it"))
		}
	}
	return steps
}

func plural(n int, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}
