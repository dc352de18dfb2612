// Package ops implements the operators' actions: inspect, redrive, discard, trace, and diagnose. Every change is
// recorded in the same transaction, with the operator and the reason.
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
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/time/rate"
)

// Selection selects the dead letters to resolve, and says how.
type Selection struct {
	Filter deadletter.Filter
	Note   deadletter.Note
	// PerSecond limits how many dead letters are resolved a second. Default 100.
	PerSecond float64
	// DryRun reports what would happen, and changes nothing.
	DryRun bool
	// Force also redrives messages that may already have had their effect, because their copies can no longer be
	// recognized.
	Force bool
	// Groups are all consumer groups.
	Groups []Group
	// Begin, unless it is nil, is called before the first dead letter with the number to resolve.
	Begin func(total int64)
}

// Outcome is what became of a dead letter: a resolution, or the reason why there is none.
type Outcome struct {
	Letter     deadletter.Stored
	Resolution deadletter.Resolution
	Detail     string
	Err        error
}

// Redrive sends the messages of dead letters again: those of the relay into the outbox, those of a consumer group to
// its retries. It knows which effects are committed: it resolves such a dead letter as a duplicate, and nothing is
// applied twice.
//
// It takes the dead letters that exist when it begins. A message that dies again becomes another dead letter, which it
// leaves alone; otherwise a redrive of a message that cannot be published yet would never end. It calls each for every
// dead letter, and for those that the filter names by ID and that are not open or that do not match the rest of the
// filter. When ctx ends, Redrive finishes the current dead letter, calls each for it, and returns the error of ctx.
func Redrive(ctx context.Context, db *pgxpool.Pool, selection Selection, each func(Outcome)) error {
	return resolve(ctx, db, selection, each, selection.redrive)
}

// Discard gives dead letters up. Otherwise it is like Redrive.
func Discard(ctx context.Context, db *pgxpool.Pool, selection Selection, each func(Outcome)) error {
	discard := func(context.Context, pgx.Tx, deadletter.Stored) (deadletter.Resolution, string, error) {
		return deadletter.Discarded, "", nil
	}
	return resolve(ctx, db, selection, each, discard)
}

// errDryRun rolls back a transaction that succeeded.
var errDryRun = errors.New("dry run")

// resolver does in tx what a resolution requires, and returns the resolution.
type resolver func(ctx context.Context, tx pgx.Tx, letter deadletter.Stored) (
	resolution deadletter.Resolution, detail string, err error)

func resolve(ctx context.Context, db *pgxpool.Pool, selection Selection, each func(Outcome), fn resolver) error {
	if err := checked(selection.Note); err != nil {
		return err
	}
	pace := rate.NewLimiter(rate.Limit(cmp.Or(selection.PerSecond, 100)), 1)
	missing := slices.Clone(selection.Filter.IDs)
	err := letters(ctx, db, selection, func(letter deadletter.Stored) error {
		if err := pace.Wait(ctx); err != nil {
			return err
		}
		outcome := resolveOne(ctx, db, selection, letter, fn)
		if isGeneral(outcome.Err) {
			return fmt.Errorf("dead letter %d: %w", letter.ID, outcome.Err)
		}
		each(outcome)
		missing = slices.DeleteFunc(missing, func(id int64) bool { return id == letter.ID })
		return nil
	})
	if err != nil {
		return err
	}
	for _, id := range missing {
		each(Outcome{Letter: deadletter.Stored{ID: id}, Err: errNotOpen})
	}
	return nil
}

// isGeneral reports whether an error is not about one dead letter, so that the next one would get it too.
func isGeneral(err error) bool {
	return errors.Is(err, postgres.ErrUnavailable) || errors.Is(err, postgres.ErrOutcomeUnknown) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// letters calls do for each dead letter that the selection matches now, in the order of their IDs, until do returns an
// error.
func letters(ctx context.Context, db *pgxpool.Pool, selection Selection, do func(deadletter.Stored) error) error {
	const page = 100
	total, last, err := deadletter.Count(ctx, db, selection.Filter)
	if err != nil {
		return err
	}
	if selection.Begin != nil {
		selection.Begin(total)
	}
	for after := int64(0); after < last; {
		found, err := deadletter.List(ctx, db, selection.Filter, after, page)
		if err != nil {
			return err
		}
		for _, letter := range found {
			if after = letter.ID; after > last {
				return nil
			}
			if err := do(letter); err != nil {
				return err
			}
		}
		if len(found) < page {
			return nil
		}
	}
	return nil
}

// grace is how long the current dead letter may still take when the operator interrupts.
const grace = 5 * time.Second

// withGrace returns a context that ends some time after ctx, so that work in progress ends with a known result.
func withGrace(ctx context.Context) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(grace, cancel) })
	return longer, func() { stop(); cancel() }
}

func resolveOne(
	ctx context.Context, db *pgxpool.Pool, selection Selection, letter deadletter.Stored, fn resolver,
) Outcome {
	outcome := Outcome{Letter: letter}
	ctx, done := withGrace(ctx)
	defer done()
	outcome.Err = postgres.Transact(ctx, db, func(tx pgx.Tx) error {
		locked, err := lockLetter(ctx, tx, letter.ID)
		if err != nil {
			return err
		}
		outcome.Resolution, outcome.Detail, err = fn(ctx, tx, locked)
		if err != nil {
			return err
		}
		err = resolveLetter(ctx, tx, letter.ID, outcome.Resolution, selection.Note, outcome.Detail)
		if err != nil {
			return err
		}
		if selection.DryRun {
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

// neverApplied are the reasons of dead letters that the inbox wrote for messages that it had taken. The effects of
// those messages were never committed.
var neverApplied = []deadletter.Reason{
	deadletter.Exhausted, deadletter.Permanent, deadletter.Crashed, deadletter.UnknownType, deadletter.Undecodable,
	deadletter.Skipped,
}

func (s Selection) redrive(
	ctx context.Context, tx pgx.Tx, letter deadletter.Stored,
) (deadletter.Resolution, string, error) {
	for _, group := range s.Groups {
		if group.Ended == nil || !slices.Contains(group.Types, letter.Type) {
			continue
		}
		if resolution, detail, err := group.Ended(ctx, tx, letter); err != nil || resolution != "" {
			return resolution, detail, err
		}
	}
	if letter.Consumer == "" {
		return s.republish(ctx, tx, letter)
	}
	switch {
	case !slices.Contains(Names(s.Groups), letter.Consumer):
		return "", "", fmt.Errorf("consumer group %q no longer exists", letter.Consumer)
	case letter.Reason == deadletter.Malformed:
		return "", "", errors.New("the message can be neither stored nor applied; discard it")
	case (letter.Reason == deadletter.NoID || letter.Reason == deadletter.OutsideWindow) && !s.Force:
		return "", "", fmt.Errorf("reason %s: the message may have been applied before; "+
			"force it if applying it again does no harm", letter.Reason)
	}
	d := messaging.Delivery{
		ID: letter.MessageID, Type: letter.Type, Key: letter.Key, Payload: letter.Payload, Headers: letter.Headers,
	}
	// A dead letter outside the window gets here only by force.
	mine := slices.Contains(neverApplied, letter.Reason) || letter.Reason == deadletter.OutsideWindow
	err := inbox.Requeue(ctx, tx, letter.Consumer, d, mine)
	if errors.Is(err, inbox.ErrTaken) {
		return deadletter.Duplicate, err.Error(), nil
	}
	return deadletter.Redriven, "", err
}

// republish inserts a message that the relay parked into the log again, under its own ID. If that ID is too old for
// consumers, it needs force, and a new ID.
func (s Selection) republish(
	ctx context.Context, tx pgx.Tx, letter deadletter.Stored,
) (deadletter.Resolution, string, error) {
	id, err := uuid.Parse(letter.MessageID)
	if err != nil {
		return "", "", fmt.Errorf("message ID: %w", err)
	}
	detail := ""
	if age := time.Since(time.Unix(id.Time().UnixTime())); age > outbox.MaxAge-time.Hour {
		if !s.Force {
			return "", "", fmt.Errorf("the message ID is %s old, and consumers would refuse it; "+
				"force it to be published under a new ID", age.Round(time.Hour))
		}
		if id, err = uuid.NewV7(); err != nil {
			return "", "", err
		}
		detail = "published as " + id.String()
	}
	message := messaging.Message{
		ID: id, Type: letter.Type, Key: letter.Key, Payload: letter.Payload, Headers: letter.Headers,
	}
	return deadletter.Redriven, detail, outbox.Insert(ctx, tx, message)
}
