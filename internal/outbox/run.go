package outbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/dev/failpoint"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/cenkalti/backoff/v5"
)

// maxInFlight is how many pages may be without verdict. With two, the next page is read, claimed and written while the
// broker still works on the one before; more would only add to what a crash repeats.
const maxInFlight = 2

// minPoll is how soon the log is looked at again after something was found; the pause doubles from there to the poll
// interval.
const minPoll = 2 * time.Millisecond

// errBroker is wrapped by the failures that leave the lease and the position intact.
var errBroker = errors.New("broker")

// run publishes under one lease. It is a single goroutine: read, claim, publish, settle. When the broker fails, it goes
// back to the last position that is known to be delivered; when the database fails, it ends, and the next run asks the
// cursor where it stands.
type run struct {
	log       eventLog
	cursor    *cursor
	publisher messaging.Publisher
	meters    *meters
	problem   *problem
	spans     spanMaker
	wake      LocalBell
	poll      time.Duration
	pause     *backoff.ExponentialBackOff

	next     position // where to read on
	claimed  string   // the snapshot that was claimed last
	ahead    *ahead   // what is being read there already
	inFlight []flight // published, without verdict, oldest first
	settled  progress // what is delivered and not yet recorded
	dirty    bool     // settled has something to record
	// caughtUp: all that there was has been read, and no doorbell has rung since. There is no use in looking for more
	// before the broker has answered.
	caughtUp bool
	// alone is how many more messages are to be published one by one. The broker closed the channel over one of them
	// without saying which; published alone, it gives itself away, and the others are repeated once and no more.
	alone int
}

// flight is a page on its way.
type flight struct {
	*page
	sent    []int   // indexes of the rows that were published
	invalid []error // a row: why it was not
	receipt messaging.Receipt
	written time.Time
	spans   spans
}

func (t *lease) newRun(held *cursor, at position) *run {
	config := t.relay.config
	return &run{
		log:    eventLog{db: t.relay.db, shard: t.shard, maxRows: config.PageRows, maxBytes: config.PageBytes},
		cursor: held, publisher: t.publisher, meters: &t.relay.meters, problem: &t.problem, spans: t.relay.spans,
		wake: t.wake, poll: config.PollInterval, pause: t.pause,
		next: at, settled: progress{delivered: at},
	}
}

// loop publishes until the database fails, the lease is lost, or ctx is done, when it still settles what is in flight.
func (r *run) loop(ctx context.Context) error {
	var sleep time.Duration
	for {
		idle, err := r.step(ctx)
		switch {
		case errors.Is(err, postgres.ErrOutcomeUnknown), errors.Is(err, errFenced), errors.Is(err, errDrained):
			r.giveUp()
			return err
		case ctx.Err() != nil:
			return r.finish(ctx)
		case errors.Is(err, errBroker):
			if err := r.retreat(ctx, err); err != nil {
				return err
			}
			sleep = 0
		case err != nil:
			r.giveUp()
			return err
		case idle:
			sleep = min(max(2*sleep, minPoll), r.poll)
			wait(ctx, r.wake, sleep)
		default:
			sleep = 0
		}
	}
}

// step does the next thing: publish another page if there is one and room for it, else settle the oldest in flight,
// else record. It returns true when there was nothing to do.
func (r *run) step(ctx context.Context) (idle bool, err error) {
	retired := r.ahead == nil && r.cursor.retired.Load() // known before the log is looked at
	if len(r.inFlight) < r.room() && (len(r.inFlight) == 0 || !r.caughtUp) {
		found, at, err := r.read(ctx)
		if err != nil {
			return false, err
		}
		r.next, r.caughtUp = at, found == nil
		if found != nil {
			return false, r.publish(ctx, found)
		}
	}
	switch {
	case len(r.inFlight) > 0:
		return false, r.settle(ctx)
	case r.settled.delivered != r.next: // a batch came to its end, and there is nothing new
		r.settled.delivered, r.dirty = r.next, true
		fallthrough
	case r.dirty:
		return !retired, r.record(ctx, "")
	case retired:
		return false, r.cursor.drain(ctx)
	}
	return true, nil
}

func (r *run) room() int {
	if r.alone > 0 {
		return 1
	}
	return maxInFlight
}

// read returns the next page, which may have been read ahead.
func (r *run) read(ctx context.Context) (*page, position, error) {
	if ahead := r.ahead; ahead != nil {
		r.ahead = nil
		<-ahead.done
		return ahead.found, ahead.at, ahead.err
	}
	log := r.log
	if r.alone > 0 {
		log.maxRows = 1
	}
	defer func() { r.log.bounds = log.bounds }()
	if len(r.settled.parked) > 0 { // parking takes a statement of its own
		return log.next(ctx, r.next)
	}
	found, at, moved, err := log.nextAndMove(ctx, r.next, claim{r.cursor, r.settled})
	if moved != nil {
		r.cursor.moved(*moved)
		r.recorded(ctx)
	}
	return found, at, err
}

// ahead is a page that is being read while the broker works.
type ahead struct {
	done  chan struct{}
	found *page
	at    position
	err   error
}

// readAhead begins to read the page behind one that has been published. It begins within a batch only: what stands
// there is settled, while the news behind the batch are the fresher the later they are looked for. (At the batch's end
// it finds news all the same.)
func (r *run) readAhead(ctx context.Context) {
	if r.next.batch == "" || r.alone > 0 {
		return
	}
	r.ahead = &ahead{done: make(chan struct{})}
	go func(a *ahead, at position) {
		defer close(a.done)
		a.found, a.at, a.err = r.log.next(ctx, at)
	}(r.ahead, r.next)
}

// publish claims a page, if that is not done yet, and only then writes it to the broker.
func (r *run) publish(ctx context.Context, found *page) error {
	if !found.claimed {
		claim := found.snapshot
		if claim == r.claimed {
			claim = "" // a further page of a batch that is claimed: no need to wait for the disk again
		}
		if err := r.record(ctx, claim); err != nil {
			return err
		}
	}
	r.claimed = found.snapshot
	failpoint.Hit("relay.claimed")
	one := flight{page: found, invalid: make([]error, len(found.rows))}
	var messages []messaging.Message
	for i, row := range found.rows {
		if one.invalid[i] = row.validate(); one.invalid[i] == nil {
			messages, one.sent = append(messages, row.message), append(one.sent, i)
		}
	}
	one.spans = r.spans.start(ctx, messages)
	receipt, err := r.publisher.Publish(ctx, messages)
	if err != nil {
		one.spans.end(nil, err)
		return fmt.Errorf("%w: publish page: %w", errBroker, err)
	}
	failpoint.Hit("relay.published")
	one.receipt, one.written = receipt, time.Now()
	r.meters.page.Record(ctx, int64(len(found.rows)))
	r.inFlight = append(r.inFlight, one)
	r.problem.wrote(one.written)
	r.next, r.caughtUp = found.end, found.end.batch == ""
	r.readAhead(ctx)
	return nil
}

// await waits for what the broker says of a page. It returns false if ctx ended the wait, or the doorbell while there
// is room for another page: what has been inserted meanwhile should be read, claimed and written while the broker
// works, and not wait for its answer first.
func (r *run) await(ctx context.Context, page flight) ([]error, bool) {
	if len(r.inFlight) >= r.room() {
		found := page.receipt.Wait(ctx)
		return found, ctx.Err() == nil
	}
	ctx, cancel := context.WithCancel(ctx)
	listening := make(chan struct{})
	go func() {
		defer close(listening)
		select {
		case <-r.wake: // and the log is looked at next, whether or not the wait is over by itself
			r.caughtUp = false
			cancel()
		case <-ctx.Done():
		}
	}()
	found := page.receipt.Wait(ctx)
	brokenOff := ctx.Err() != nil
	cancel()
	<-listening
	return found, !brokenOff || !slices.ContainsFunc(found,
		func(verdict error) bool { return errors.Is(verdict, context.Canceled) })
}

// settle waits for the verdicts on the oldest page. The position moves over the rows up to the first one that must be
// sent again: everything behind that one is sent again too, whatever its own verdict, so that the order holds. It
// counts a page once: if the wait is broken off, nothing is counted yet and the page stays in flight; else the page is
// out of flight, in whole or with all that is behind it.
func (r *run) settle(ctx context.Context) error {
	oldest := r.inFlight[0]
	heard, complete := r.await(ctx, oldest)
	if err := ctx.Err(); err != nil || !complete {
		return err
	}
	verdicts := slices.Clone(oldest.invalid)
	for i, verdict := range heard {
		verdicts[oldest.sent[i]] = verdict
	}
	oldest.spans.end(heard, nil)
	failpoint.Hit("relay.confirmed")
	r.meters.confirm.Record(ctx, time.Since(oldest.written).Seconds())
	for i, verdict := range verdicts {
		r.meters.verdict(ctx, verdict)
		reason, final := judge(verdict, len(oldest.rows) == 1 && len(r.inFlight) == 1)
		if !final {
			r.passed(oldest.before(i))
			r.forget(r.inFlight[1:])
			r.inFlight = nil
			if errors.Is(verdict, messaging.ErrRefused) {
				r.alone = len(oldest.rows) - i
			}
			return fmt.Errorf("%w: publish message %s: %w", errBroker, oldest.rows[i].message.ID, verdict)
		}
		if verdict == nil {
			r.settled.published++
		} else {
			r.settled.parked = append(r.settled.parked, park(ctx, oldest.rows[i], reason, verdict))
		}
		r.settled.topID = max(r.settled.topID, oldest.rows[i].id)
	}
	r.passed(oldest.end)
	r.inFlight = r.inFlight[1:]
	r.problem.settled(r.inFlight)
	r.alone = max(0, r.alone-len(oldest.rows))
	r.pause.Reset() // something got through
	return nil
}

// judge tells whether a verdict is final, and why the message is parked if it is not nil. A refusal is final for a
// message that was alone on the channel.
func judge(verdict error, alone bool) (reason deadletter.Reason, final bool) {
	switch {
	case verdict == nil:
		return "", true
	case errors.Is(verdict, messaging.ErrInvalid):
		return deadletter.Malformed, true
	case errors.Is(verdict, messaging.ErrReturned):
		return deadletter.Unroutable, true
	case errors.Is(verdict, messaging.ErrRefused) && alone:
		return deadletter.Refused, true
	}
	return "", false
}

func park(ctx context.Context, one row, reason deadletter.Reason, verdict error) deadletter.Letter {
	m := one.message
	ctx = traceOf(ctx, m.Headers)
	slog.ErrorContext(ctx, "message parked", "message_id", m.ID, "type", m.Type, "reason", reason, "error", verdict)
	return deadletter.Letter{
		MessageID: m.ID.String(), Type: m.Type, Key: m.Key, Payload: m.Payload, Headers: m.Headers,
		Reason: reason, Error: verdict.Error(), Attempts: 1,
	}
}

func (r *run) passed(at position) {
	r.settled.delivered, r.dirty = at, true
}

// record commits what is settled, and the claim of a snapshot if one is given.
func (r *run) record(ctx context.Context, claimed string) error {
	r.settled.claimed = claimed
	if err := r.cursor.move(ctx, r.settled); err != nil {
		return err
	}
	r.recorded(ctx)
	return nil
}

// recorded begins anew, after what was settled has been committed.
func (r *run) recorded(ctx context.Context) {
	r.meters.moved(ctx, &r.settled)
	r.settled, r.dirty = progress{delivered: r.settled.delivered}, false
	failpoint.Hit("relay.moved")
}

// retreat gives up what is in flight after a failure of the broker, and waits before the next try.
func (r *run) retreat(ctx context.Context, cause error) error {
	r.giveUp()
	if r.dirty {
		if err := r.record(ctx, ""); err != nil {
			return err
		}
	}
	if errors.Is(cause, messaging.ErrRefused) {
		slog.WarnContext(ctx, "broker refused something on the page, publishing one by one", "messages", r.alone,
			"error", cause)
		return nil
	}
	r.problem.failed(cause)
	retryIn := r.pause.NextBackOff()
	slog.WarnContext(ctx, "publishing interrupted", "shard", r.cursor.shard, "error", cause, "retry_in", retryIn)
	wait(ctx, nil, retryIn)
	return nil
}

// giveUp forgets what is in flight, and goes back to what is known to be delivered. The channel must go with it: a
// verdict that came later would be taken for one of the next try.
func (r *run) giveUp() {
	if r.ahead != nil {
		<-r.ahead.done
		r.ahead = nil
	}
	_ = r.publisher.Close() // it is broken already, or will be of no further use
	r.forget(r.inFlight)
	r.inFlight, r.next = nil, r.settled.delivered
}

// forget ends the spans of pages whose verdicts nobody will hear.
func (r *run) forget(flights []flight) {
	for _, one := range flights {
		one.spans.end(nil, messaging.ErrUnknown)
	}
}

// finish settles what is in flight at shutdown, so that the next relay need not send it again. The broker's silence
// must not use up the time to record what it has confirmed.
func (r *run) finish(ctx context.Context) error {
	err := shortly(ctx, func(ctx context.Context) (err error) {
		for err == nil && len(r.inFlight) > 0 {
			err = r.settle(ctx)
		}
		return err
	})
	r.giveUp()
	if !r.dirty {
		return err
	}
	return errors.Join(err, shortly(ctx, func(ctx context.Context) error { return r.record(ctx, "") }))
}

// shortly calls fn with 5 s to go, although ctx is done.
func shortly(ctx context.Context, fn func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return fn(ctx)
}
