package outbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"example.com/shop/internal/dev/failpoint"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/cenkalti/backoff/v5"
)

// maxInFlight is how many pages may wait for verdicts. With two, the relay reads, claims and writes the next page while
// the broker still works on the previous one. More would only add to what a crash repeats.
const maxInFlight = 2

// minPoll is the first pause after the relay has read everything. The pause doubles from there up to the poll interval.
const minPoll = 2 * time.Millisecond

// errBroker marks failures of the broker, which leave the lease and the position intact.
var errBroker = errors.New("broker")

// run publishes under one lease. It is a single goroutine: read, claim, publish, settle. When the broker fails, it
// returns to the last position known to be delivered. When the database fails, it ends, and the next run starts from
// the position in the cursor's row.
type run struct {
	log       eventLog
	cursor    *cursor
	publisher messaging.Publisher
	meters    *meters
	problem   *problem
	unheard   *unheard
	mustHear  func(messageType string) bool
	spans     spanMaker
	wake      LocalBell
	poll      time.Duration
	pause     *backoff.ExponentialBackOff

	next     position // where the next page starts
	claimed  string   // the snapshot claimed last
	ahead    *ahead   // the page at next, if it is being read already
	inFlight []flight // published pages that wait for verdicts, oldest first
	settled  progress // what is delivered but not yet recorded
	dirty    bool     // settled has something to record
	// caughtUp is true when everything has been read and no doorbell has rung since. Until the broker has answered,
	// there is no point in reading again.
	caughtUp bool
	// alone is how many more messages must be published one by one. The broker closed the channel over one of them
	// without naming it. Publishing them one by one identifies it, and repeats the others only once.
	alone int
}

// flight is a page in flight.
type flight struct {
	*page
	sent    []int   // indexes of the rows that were published
	invalid []error // for each row, why it was not published, or nil
	receipt messaging.Receipt
	written time.Time
	spans   spans
}

func (l *lease) newRun(held *cursor, at position) *run {
	config := l.relay.config
	return &run{
		log:    eventLog{db: l.relay.db, shard: l.shard, maxRows: config.PageRows, maxBytes: config.PageBytes},
		cursor: held, publisher: l.publisher, meters: &l.relay.meters, problem: &l.problem, spans: l.relay.spans,
		unheard: &l.relay.unheard, mustHear: config.mustBeHeard, wake: l.wake, poll: config.PollInterval, pause: l.pause,
		next: at, settled: progress{delivered: at},
	}
}

// loop publishes until the database fails, the lease is lost or ctx is done. When ctx is done, it settles the pages in
// flight before it returns.
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

// step publishes another page if there is one and there is room for it. Otherwise it settles the oldest page in flight.
// Otherwise it records progress. It returns true when there was nothing to do.
func (r *run) step(ctx context.Context) (idle bool, err error) {
	retired := r.ahead == nil && r.cursor.retired.Load() // must be known before the log is read
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
	case r.settled.delivered != r.next: // a batch has ended, and there is nothing new
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

// read returns the next page, which readAhead may have read already.
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
	if len(r.settled.parked) > 0 { // parking needs its own statement
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

// readAhead starts to read the page after one that was published, but only within a batch. The rows of a batch cannot
// change, whereas a later read after the batch finds more new rows. (A read at the batch's very end also finds new
// rows.)
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

// publish claims a page, unless it is claimed already, and only then writes it to the broker.
func (r *run) publish(ctx context.Context, found *page) error {
	if !found.claimed {
		claim := found.snapshot
		if claim == r.claimed {
			claim = "" // another page of a claimed batch: no need to wait for the disk again
		}
		if err := r.record(ctx, claim); err != nil {
			return err
		}
	}
	r.claimed = found.snapshot
	failpoint.Hit("relay.claimed")
	page := flight{page: found, invalid: make([]error, len(found.rows))}
	var messages []messaging.Message
	for i, row := range found.rows {
		if page.invalid[i] = row.validate(); page.invalid[i] == nil {
			messages, page.sent = append(messages, row.message), append(page.sent, i)
		}
	}
	page.spans = r.spans.start(ctx, messages)
	receipt, err := r.publisher.Publish(ctx, messages)
	if err != nil {
		page.spans.end(nil, err)
		return fmt.Errorf("%w: publish page: %w", errBroker, err)
	}
	failpoint.Hit("relay.published")
	page.receipt, page.written = receipt, time.Now()
	r.meters.page.Record(ctx, int64(len(found.rows)))
	r.inFlight = append(r.inFlight, page)
	r.problem.wrote(page.written)
	r.next, r.caughtUp = found.end, found.end.batch == ""
	r.readAhead(ctx)
	return nil
}

// await waits for the broker's verdicts on a page. It returns false if ctx ended the wait, or if the doorbell rang
// while there is room for another page: the relay should read, claim and write new messages while the broker works,
// and not wait for its answer first.
func (r *run) await(ctx context.Context, page flight) (verdicts []error, complete bool) {
	if len(r.inFlight) >= r.room() {
		verdicts = page.receipt.Wait(ctx)
		return verdicts, ctx.Err() == nil
	}
	ctx, cancel := context.WithCancel(ctx)
	listening := make(chan struct{})
	go func() {
		defer close(listening)
		select {
		case <-r.wake: // read the log next, even if the verdicts arrive before the cancellation
			r.caughtUp = false
			cancel()
		case <-ctx.Done():
		}
	}()
	verdicts = page.receipt.Wait(ctx)
	interrupted := ctx.Err() != nil
	cancel()
	<-listening
	cancelled := func(verdict error) bool { return errors.Is(verdict, context.Canceled) }
	return verdicts, !interrupted || !slices.ContainsFunc(verdicts, cancelled)
}

// settle waits for the verdicts on the oldest page. It moves the position up to the first row that must be sent again.
// All rows after that one are sent again too, regardless of their own verdicts, to keep the order.
//
// settle counts a page once. If the wait is interrupted, it counts nothing and the page stays in flight. Otherwise the
// page leaves the list of pages in flight; if a row must be sent again, all later pages leave it too.
func (r *run) settle(ctx context.Context) error {
	oldest := r.inFlight[0]
	answers, complete := r.await(ctx, oldest)
	if err := ctx.Err(); err != nil || !complete {
		return err
	}
	verdicts := slices.Clone(oldest.invalid)
	for i, verdict := range answers {
		verdicts[oldest.sent[i]] = verdict
	}
	oldest.spans.end(answers, nil)
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
		r.count(ctx, oldest.rows[i], reason, verdict)
	}
	r.passed(oldest.end)
	r.inFlight = r.inFlight[1:]
	r.problem.settled(r.inFlight)
	r.alone = max(0, r.alone-len(oldest.rows))
	r.pause.Reset() // the broker works again
	return nil
}

func (r *run) passed(at position) {
	r.settled.delivered, r.dirty = at, true
}

// record commits what is settled. If claimed is not "", it also claims that snapshot.
func (r *run) record(ctx context.Context, claimed string) error {
	r.settled.claimed = claimed
	if err := r.cursor.move(ctx, r.settled); err != nil {
		return err
	}
	r.recorded(ctx)
	return nil
}

// recorded counts and resets what was settled, after it was committed.
func (r *run) recorded(ctx context.Context) {
	r.meters.moved(ctx, &r.settled)
	r.settled, r.dirty = progress{delivered: r.settled.delivered}, false
	failpoint.Hit("relay.moved")
}

// retreat gives up the pages in flight after a failure of the broker, and waits before the next try.
func (r *run) retreat(ctx context.Context, cause error) error {
	r.giveUp()
	if r.dirty {
		if err := r.record(ctx, ""); err != nil {
			return err
		}
	}
	if errors.Is(cause, messaging.ErrRefused) {
		slog.WarnContext(ctx, "broker refused a message of the page, publishing one by one",
			"messages", r.alone, "error", cause)
		return nil
	}
	r.problem.failed(cause)
	retryIn := r.pause.NextBackOff()
	slog.WarnContext(ctx, "publishing interrupted", "shard", r.cursor.shard, "error", cause, "retry_in", retryIn)
	wait(ctx, nil, retryIn)
	return nil
}

// giveUp forgets the pages in flight and returns to the last position known to be delivered. It must close the channel
// too: a late verdict would be taken for one of the next try.
func (r *run) giveUp() {
	if r.ahead != nil {
		<-r.ahead.done
		r.ahead = nil
	}
	_ = r.publisher.Close() // it is broken already or no longer needed
	r.forget(r.inFlight)
	r.inFlight, r.next = nil, r.settled.delivered
}

// forget ends the spans of pages whose verdicts will never be read.
func (r *run) forget(flights []flight) {
	for _, page := range flights {
		page.spans.end(nil, messaging.ErrUnknown)
	}
}

// finish settles the pages in flight at shutdown, so that the next relay need not send them again. Recording has its
// own time limit: a silent broker must not use up the time for recording what it has confirmed.
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

// shortly calls fn with a context that ignores the end of ctx and expires after 5 s.
func shortly(ctx context.Context, fn func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return fn(ctx)
}
