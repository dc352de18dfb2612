package ops

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Refusal is an error for the operator to read: the request is impossible, and nothing was changed.
type Refusal struct{ error }

func refuse(format string, args ...any) error { return Refusal{fmt.Errorf(format, args...)} }

// checked returns an error if the note is incomplete.
func checked(note deadletter.Note) error {
	if strings.TrimSpace(note.Actor) == "" || strings.TrimSpace(note.Reason) == "" {
		return refuse("actor and reason are required: both are stored in the audit log")
	}
	return nil
}

// Group is a consumer group and the types that it consumes.
type Group struct {
	Name  string
	Types []string
	// Ended, unless it is nil, is called before a message of these types is redriven. It returns a resolution if the
	// message has no work left, an error if it must be discarded, and otherwise "".
	Ended func(ctx context.Context, tx pgx.Tx, letter deadletter.Stored) (
		resolution deadletter.Resolution, detail string, err error)
}

// Names returns the names of groups.
func Names(groups []Group) (names []string) {
	for _, group := range groups {
		names = append(names, group.Name)
	}
	return names
}

// Operator acts on consumer groups.
type Operator struct {
	DB *pgxpool.Pool
	// Groups are all consumer groups.
	Groups []Group
}

// act runs fn in one transaction together with its record in the audit log. The result of fn is the record's detail.
func (d Operator) act(
	ctx context.Context, action, group, key string, note deadletter.Note, fn func(tx pgx.Tx) (detail string, err error),
) error {
	if err := checked(note); err != nil {
		return err
	}
	if !slices.Contains(Names(d.Groups), group) {
		return refuse("consumer group %q does not exist", group)
	}
	target := group
	if key != "" {
		target += "/" + key
	}
	return postgres.Transact(ctx, d.DB, func(tx pgx.Tx) error {
		detail, err := fn(tx)
		if err != nil {
			return err
		}
		return Record(ctx, tx, Entry{Action: action, Target: target, Note: note, Detail: detail})
	})
}

// Pause stops a group from taking messages. Its consumers finish what they have taken; the rest stays in the queue and
// in the retries.
func (d Operator) Pause(ctx context.Context, group string, note deadletter.Note) error {
	return d.act(ctx, "pause", group, "", note, func(tx pgx.Tx) (string, error) {
		done, err := inbox.Pause(ctx, tx, group, note.Actor, note.Reason)
		if err == nil && !done {
			err = refuse("group %s is already paused", group)
		}
		return "", err
	})
}

// Resume ends a pause.
func (d Operator) Resume(ctx context.Context, group string, note deadletter.Note) error {
	return d.act(ctx, "resume", group, "", note, func(tx pgx.Tx) (string, error) {
		done, err := inbox.Resume(ctx, tx, group)
		if err == nil && !done {
			err = refuse("group %s is not paused", group)
		}
		return "", err
	})
}

// SkipHead moves the message that blocks a key to the dead letters, and returns its ID. To undo that, redrive the dead
// letter; the message then comes last of its key.
func (d Operator) SkipHead(ctx context.Context, group, key string, note deadletter.Note) (messageID string, err error) {
	moved, err := d.bury(ctx, "skip", group, key, false, note)
	if err != nil {
		return "", err
	}
	return moved[0], nil
}

// ParkKey moves all waiting messages of a key to the dead letters, and returns how many. A redrive sends them in their
// order.
func (d Operator) ParkKey(ctx context.Context, group, key string, note deadletter.Note) (int, error) {
	moved, err := d.bury(ctx, "park", group, key, true, note)
	return len(moved), err
}

func (d Operator) bury(
	ctx context.Context, action, group, key string, whole bool, note deadletter.Note,
) (moved []string, err error) {
	err = d.act(ctx, action, group, key, note, func(tx pgx.Tx) (string, error) {
		cause := fmt.Sprintf("skipped by operator %s: %s", note.Actor, note.Reason)
		moved, err = inbox.Bury(ctx, tx, group, key, whole, cause)
		switch {
		case errors.Is(err, inbox.ErrBeingTried):
			return "", Refusal{err}
		case err == nil && len(moved) == 0:
			return "", refuse("nothing waits on key %q of group %s", key, group)
		case err != nil:
			return "", err
		case len(moved) == 1:
			return "message " + moved[0], nil
		}
		return fmt.Sprintf("%d messages", len(moved)), nil
	})
	return moved, err
}

// Reopen reverts the discard of a dead letter.
func Reopen(ctx context.Context, db *pgxpool.Pool, id int64, note deadletter.Note) error {
	if err := checked(note); err != nil {
		return err
	}
	err := postgres.Transact(ctx, db, func(tx pgx.Tx) error { return reopenLetter(ctx, tx, id, note) })
	if errors.Is(err, errNotDiscarded) {
		return Refusal{err}
	}
	return err
}
