// Package ops is what operators do: look, redrive, discard, trace, and ask the doctor. It guarantees that whatever it
// changes is recorded in the same transaction, with who did it and why.
package ops

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"example.com/shop/internal/deadletter"
	operationsv1 "example.com/shop/internal/gen/shop/operations/v1"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/operations"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/time/rate"
)

// Selection is to resolve dead letters.
type Selection struct {
	Filter deadletter.Filter
	Note   deadletter.Note
	// PerSecond bounds how many letters are resolved a second. Default 100.
	PerSecond float64
	// DryRun tells what would happen, and changes nothing.
	DryRun bool
	// Force redrives also what may have had its effect already, because its copies can no longer be told from it.
	Force bool
	// Groups are the consumer groups that there are, that of durable calls among them.
	Groups []string
	// Begin, unless it is nil, is called before the first letter with how many there are to resolve.
	Begin func(total int64)
}

// Outcome is what became of one letter: a resolution, or why there is none.
type Outcome struct {
	Letter     deadletter.Stored
	Resolution deadletter.Resolution
	Detail     string
	Err        error
}

// Redrive sends the messages of letters on their way again: those of the relay into the outbox, those of a consumer
// group to its retries. It knows which effects are committed: such a letter is resolved as a duplicate, and nothing is
// applied twice.
//
// It takes the letters that were there when it began. A message that dies again is another letter, and left alone: else
// a redrive of what cannot be published yet would never end. Each is called for every letter, and for those that the
// filter names by ID and that are not open or not among the others it asks for. When ctx ends, the letter that is under
// way is resolved, Each is told of it, and the error is that of ctx.
func Redrive(ctx context.Context, db *pgxpool.Pool, order Selection, each func(Outcome)) error {
	return resolve(ctx, db, order, each, order.redrive)
}

// Discard gives letters up, and is like Redrive in all else.
func Discard(ctx context.Context, db *pgxpool.Pool, order Selection, each func(Outcome)) error {
	return resolve(ctx, db, order, each, func(context.Context, pgx.Tx, deadletter.Stored) (deadletter.Resolution,
		string, error) {
		return deadletter.Discarded, "", nil
	})
}

// errDryRun rolls a transaction back that did what was asked for.
var errDryRun = errors.New("dry run")

// decide does in tx what a resolution takes, and says which it is.
type decide func(ctx context.Context, tx pgx.Tx, letter deadletter.Stored) (resolution deadletter.Resolution,
	detail string, err error)

func resolve(ctx context.Context, db *pgxpool.Pool, order Selection, each func(Outcome), how decide) error {
	if err := checked(order.Note); err != nil {
		return err
	}
	pace := rate.NewLimiter(rate.Limit(cmp.Or(order.PerSecond, 100)), 1)
	missing := slices.Clone(order.Filter.IDs)
	err := letters(ctx, db, order, func(letter deadletter.Stored) error {
		if err := pace.Wait(ctx); err != nil {
			return err
		}
		outcome := resolveOne(ctx, db, order, letter, how)
		if undecided(outcome.Err) {
			return fmt.Errorf("letter %d: %w", letter.ID, outcome.Err)
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

// undecided tells an error that says nothing of the letter: the next one would meet it, too.
func undecided(err error) bool {
	return errors.Is(err, postgres.ErrUnavailable) || errors.Is(err, postgres.ErrOutcomeUnknown) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// letters calls do for each letter that an order chooses and that is there now, in the order of their IDs, until do
// returns an error.
func letters(ctx context.Context, db *pgxpool.Pool, order Selection, do func(deadletter.Stored) error) error {
	const page = 100
	total, last, err := deadletter.Count(ctx, db, order.Filter)
	if err != nil {
		return err
	}
	if order.Begin != nil {
		order.Begin(total)
	}
	for after := int64(0); after < last; {
		found, err := deadletter.List(ctx, db, order.Filter, after, page)
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

// grace is how long a letter that is under way may still take when the operator breaks off.
const grace = 5 * time.Second

// lasting returns a context that ends some time after ctx, so that what is under way comes to an end that is known.
func lasting(ctx context.Context) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(grace, cancel) })
	return longer, func() { stop(); cancel() }
}

func resolveOne(ctx context.Context, db *pgxpool.Pool, order Selection, letter deadletter.Stored, how decide) Outcome {
	outcome := Outcome{Letter: letter}
	ctx, done := lasting(ctx)
	defer done()
	outcome.Err = postgres.Transact(ctx, db, func(tx pgx.Tx) error {
		locked, err := lockLetter(ctx, tx, letter.ID)
		if err != nil {
			return err
		}
		outcome.Resolution, outcome.Detail, err = how(ctx, tx, locked)
		if err != nil {
			return err
		}
		if err := resolveLetter(ctx, tx, letter.ID, outcome.Resolution, order.Note, outcome.Detail); err != nil {
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

// owned are the reasons of letters that the inbox wrote for messages which it had taken: their effects were never
// committed.
var owned = []deadletter.Reason{deadletter.Exhausted, deadletter.Permanent, deadletter.Crashed, deadletter.UnknownType,
	deadletter.Undecodable,
	deadletter.Skipped}

func (o Selection) redrive(
	ctx context.Context, tx pgx.Tx, letter deadletter.Stored,
) (deadletter.Resolution, string, error) {
	if letter.Type == operations.MessageType {
		if resolution, detail, err := durable(ctx, tx, letter); err != nil || resolution != "" {
			return resolution, detail, err
		}
	}
	if letter.Consumer == "" {
		return o.republish(ctx, tx, letter)
	}
	switch {
	case !slices.Contains(o.Groups, letter.Consumer):
		return "", "", fmt.Errorf("there is no consumer group %q any more", letter.Consumer)
	case letter.Reason == deadletter.Malformed:
		return "", "", errors.New("the message can be neither stored nor applied; discard it")
	case (letter.Reason == deadletter.NoID || letter.Reason == deadletter.OutsideWindow) && !o.Force:
		return "", "", fmt.Errorf("reason %s: whether it was applied before cannot be known; force it if applying "+
			"it again does no harm", letter.Reason)
	}
	d := messaging.Delivery{ID: letter.MessageID, Type: letter.Type, Key: letter.Key, Payload: letter.Payload,
		Headers: letter.Headers}
	// Which comes here by force only.
	mine := slices.Contains(owned, letter.Reason) || letter.Reason == deadletter.OutsideWindow
	err := inbox.Requeue(ctx, tx, letter.Consumer, d, mine)
	if errors.Is(err, inbox.ErrTaken) {
		return deadletter.Duplicate, err.Error(), nil
	}
	return deadletter.Redriven, "", err
}

// durable decides about the message of a durable call that has ended: to execute it once more would change nothing,
// since its caller has the result and the request is erased. It returns "" if the call has not ended, so that its
// message may go on.
func durable(ctx context.Context, tx pgx.Tx, letter deadletter.Stored) (deadletter.Resolution, string, error) {
	state, err := operations.StateOf(ctx, tx, letter.MessageID)
	switch {
	case err != nil:
		return "", "", err
	case state == operationsv1.OperationState_OPERATION_STATE_UNSPECIFIED:
		return "", "", errors.New("its durable call is not known, or not any more; discard it")
	case state == operationsv1.OperationState_OPERATION_STATE_SUCCEEDED:
		return deadletter.Duplicate, "its durable call has succeeded", nil
	case state == operationsv1.OperationState_OPERATION_STATE_FAILED,
		state == operationsv1.OperationState_OPERATION_STATE_CANCELLED:
		return "", "", fmt.Errorf("its durable call has ended as %s, and its caller was told so: "+
			"only the caller can submit it again, without the old idempotency key; discard it",
			strings.ToLower(strings.TrimPrefix(state.String(), "OPERATION_STATE_")))
	}
	return "", "", nil
}

// republish puts what the relay parked into the log again, under its own ID. Is that too old to be known by, it takes
// another.
func (o Selection) republish(
	ctx context.Context, tx pgx.Tx, letter deadletter.Stored,
) (deadletter.Resolution, string, error) {
	id, err := uuid.Parse(letter.MessageID)
	if err != nil {
		return "", "", fmt.Errorf("message ID: %w", err)
	}
	detail := ""
	if age := time.Since(time.Unix(id.Time().UnixTime())); age > outbox.MaxAge-time.Hour {
		if !o.Force {
			return "", "", fmt.Errorf("the message ID is %s old, and consumers would refuse it; force it to be "+
				"published under a new ID", age.Round(time.Hour))
		}
		if id, err = uuid.NewV7(); err != nil {
			return "", "", err
		}
		detail = "published as " + id.String()
	}
	message := messaging.Message{ID: id, Type: letter.Type, Key: letter.Key, Payload: letter.Payload,
		Headers: letter.Headers}
	return deadletter.Redriven, detail, outbox.Insert(ctx, tx, message)
}
