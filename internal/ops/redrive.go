// Package ops is what operators do: look, redrive, discard, trace, and ask the doctor. It guarantees that whatever it changes is recorded in the same
// transaction, with who did it and why.
package ops

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"example.com/orders/internal/deadletter"
	"example.com/orders/internal/inbox"
	"example.com/orders/internal/messaging"
	"example.com/orders/internal/outbox"
	"example.com/orders/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/time/rate"
)

// Order is to resolve dead letters.
type Order struct {
	Filter deadletter.Filter
	Note   deadletter.Note
	// PerSecond bounds how many letters are resolved a second. Default 100.
	PerSecond float64
	// DryRun tells what would happen, and changes nothing.
	DryRun bool
	// Force redrives also what may have had its effect already, because its copies can no longer be told from it.
	Force bool
	// Groups are the consumer groups that there are.
	Groups []string
}

// Outcome is what became of one letter: a resolution, or why there is none.
type Outcome struct {
	Letter     deadletter.Stored
	Resolution deadletter.Resolution
	Detail     string
	Err        error
}

// Redrive sends the messages of letters on their way again: those of the relay into the outbox, those of a consumer group to its retries. It knows
// which effects are committed: such a letter is resolved as a duplicate, and nothing is applied twice. Each is called for every letter, and for those
// that the filter names by ID and that are not open or not among the others it asks for.
func Redrive(ctx context.Context, db *pgxpool.Pool, order Order, each func(Outcome)) error {
	return resolve(ctx, db, order, each, order.redrive)
}

// Discard gives letters up.
func Discard(ctx context.Context, db *pgxpool.Pool, order Order, each func(Outcome)) error {
	return resolve(ctx, db, order, each, func(context.Context, pgx.Tx, deadletter.Stored) (deadletter.Resolution, string, error) {
		return deadletter.Discarded, "", nil
	})
}

// errDryRun rolls a transaction back that did what was asked for.
var errDryRun = errors.New("dry run")

// decide does in tx what a resolution takes, and says which it is.
type decide func(ctx context.Context, tx pgx.Tx, letter deadletter.Stored) (resolution deadletter.Resolution, detail string, err error)

func resolve(ctx context.Context, db *pgxpool.Pool, order Order, each func(Outcome), how decide) error {
	if strings.TrimSpace(order.Note.Actor) == "" || strings.TrimSpace(order.Note.Reason) == "" {
		return errors.New("who does this and why must be given: both are kept in the audit log")
	}
	if order.PerSecond <= 0 {
		order.PerSecond = 100
	}
	pace := rate.NewLimiter(rate.Limit(order.PerSecond), 1)
	missing := slices.Clone(order.Filter.IDs)
	const page = 100
	for after := int64(0); ; {
		letters, err := deadletter.List(ctx, db, order.Filter, after, page)
		if err != nil {
			return err
		}
		for _, letter := range letters {
			after = letter.ID
			if err := pace.Wait(ctx); err != nil {
				return err
			}
			outcome := resolveOne(ctx, db, order, letter, how)
			if errors.Is(outcome.Err, postgres.ErrUnavailable) || errors.Is(outcome.Err, postgres.ErrOutcomeUnknown) || ctx.Err() != nil {
				return outcome.Err
			}
			each(outcome)
			missing = slices.DeleteFunc(missing, func(id int64) bool { return id == letter.ID })
		}
		if len(letters) < page {
			break
		}
	}
	for _, id := range missing {
		each(Outcome{Letter: deadletter.Stored{ID: id}, Err: deadletter.ErrNotOpen})
	}
	return nil
}

func resolveOne(ctx context.Context, db *pgxpool.Pool, order Order, letter deadletter.Stored, how decide) Outcome {
	outcome := Outcome{Letter: letter}
	outcome.Err = postgres.Transact(ctx, db, func(tx pgx.Tx) error {
		locked, err := deadletter.Lock(ctx, tx, letter.ID)
		if err != nil {
			return err
		}
		outcome.Resolution, outcome.Detail, err = how(ctx, tx, locked)
		if err != nil {
			return err
		}
		if err := deadletter.Resolve(ctx, tx, letter.ID, outcome.Resolution, order.Note, outcome.Detail); err != nil {
			return err
		}
		if order.DryRun {
			return errDryRun
		}
		return nil
	})
	if errors.Is(outcome.Err, errDryRun) {
		outcome.Err = nil
	}
	if outcome.Err != nil {
		outcome.Resolution = ""
	}
	return outcome
}

// owned are the reasons of letters that the inbox wrote for messages which it had taken: their effects were never committed.
var owned = []deadletter.Reason{deadletter.Exhausted, deadletter.Permanent, deadletter.Crashed, deadletter.UnknownType, deadletter.Undecodable,
	deadletter.Skipped}

func (o Order) redrive(ctx context.Context, tx pgx.Tx, letter deadletter.Stored) (deadletter.Resolution, string, error) {
	if letter.Consumer == "" {
		return o.republish(ctx, tx, letter)
	}
	switch {
	case !slices.Contains(o.Groups, letter.Consumer):
		return "", "", fmt.Errorf("there is no consumer group %q any more", letter.Consumer)
	case letter.Reason == deadletter.Malformed:
		return "", "", errors.New("the message can be neither stored nor applied; discard it")
	case (letter.Reason == deadletter.NoID || letter.Reason == deadletter.OutsideWindow) && !o.Force:
		return "", "", fmt.Errorf("reason %s: whether it was applied before cannot be known; force it if applying it again does no harm", letter.Reason)
	}
	d := messaging.Delivery{ID: letter.MessageID, Type: letter.Type, Key: letter.Key, Payload: letter.Payload, Headers: letter.Headers}
	mine := slices.Contains(owned, letter.Reason) || letter.Reason == deadletter.OutsideWindow // which comes here by force only
	err := inbox.Requeue(ctx, tx, letter.Consumer, d, mine)
	if errors.Is(err, inbox.ErrTaken) {
		return deadletter.Duplicate, err.Error(), nil
	}
	return deadletter.Redriven, "", err
}

// republish puts what the relay parked into the log again, under its own ID. Is that too old to be known by, it takes another.
func (o Order) republish(ctx context.Context, tx pgx.Tx, letter deadletter.Stored) (deadletter.Resolution, string, error) {
	id, err := uuid.Parse(letter.MessageID)
	if err != nil {
		return "", "", fmt.Errorf("message ID: %w", err)
	}
	detail := ""
	if age := time.Since(time.Unix(id.Time().UnixTime())); age > outbox.MaxAge-time.Hour {
		if !o.Force {
			return "", "", fmt.Errorf("the message ID is %s old, and consumers would refuse it; force it to be published under a new ID", age.Round(time.Hour))
		}
		if id, err = uuid.NewV7(); err != nil {
			return "", "", err
		}
		detail = "published as " + id.String()
	}
	message := messaging.Message{ID: id, Type: letter.Type, Key: letter.Key, Payload: letter.Payload, Headers: letter.Headers}
	return deadletter.Redriven, detail, outbox.Insert(ctx, tx, message)
}
