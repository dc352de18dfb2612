package console

import (
	"cmp"
	"context"
	"errors"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/deadletter"
	opsv1 "example.com/shop/internal/gen/ops/v1"
	"example.com/shop/internal/gen/ops/v1/opsv1connect"
	"example.com/shop/internal/ops"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func filterOf(f *opsv1.DeadLetterFilter) (deadletter.Filter, error) {
	err := cmp.Or(
		storable(f.GetGroup(), f.GetMessageId(), f.GetType(), f.GetKey(), f.GetCause()),
		validTimes(f.GetSince(), f.GetUntil()),
	)
	return deadletter.Filter{
		IDs: f.GetIds(), Consumer: f.GetGroup(), MessageID: f.GetMessageId(), Type: f.GetType(), Key: f.GetKey(),
		Reason: deadletter.Reason(f.GetCause()), Since: optionalTime(f.GetSince()), Until: optionalTime(f.GetUntil()),
		Resolved: f.GetResolved(),
	}, err
}

// ListDeadLetters implements ops.v1.OpsService.
func (c *Console) ListDeadLetters(
	ctx context.Context, req *opsv1.ListDeadLettersRequest,
) (*opsv1.ListDeadLettersResponse, error) {
	filter, err := filterOf(req.GetFilter())
	if err != nil {
		return nil, err
	}
	// One row more than a page tells if there is a next page.
	letters, err := deadletter.Newest(ctx, c.db, filter, req.GetPageToken(), pageRows+1)
	if err != nil {
		return nil, publicError(err)
	}
	response := &opsv1.ListDeadLettersResponse{}
	if len(letters) > pageRows {
		letters = letters[:pageRows]
		response.NextPageToken = letters[pageRows-1].ID
	}
	for _, letter := range letters {
		response.Letters = append(response.Letters, letterOf(letter))
	}
	if req.GetCount() {
		response.Count, _, err = deadletter.Count(ctx, c.db, filter)
	}
	return response, publicError(err)
}

func letterOf(l deadletter.Stored) *opsv1.DeadLetter {
	return &opsv1.DeadLetter{
		Id: l.ID, Group: cmp.Or(l.Consumer, deadletter.Relay), MessageId: l.MessageID, Type: l.Type, Key: l.Key,
		Cause: string(l.Reason), Error: l.Error, Attempts: int32(l.Attempts), DeadTime: timestamppb.New(l.DeadAt),
		Resolution: string(l.Resolution), ResolveTime: optionalTimestamp(l.ResolvedAt),
	}
}

// GetDeadLetter implements ops.v1.OpsService.
func (c *Console) GetDeadLetter(
	ctx context.Context, req *opsv1.GetDeadLetterRequest,
) (*opsv1.GetDeadLetterResponse, error) {
	letter, found, err := deadletter.Get(ctx, c.db, req.GetId())
	switch {
	case err != nil:
		return nil, publicError(err)
	case !found:
		return nil, connect.Errorf(connect.CodeNotFound, "there is no dead letter %d", req.GetId())
	}
	records, err := deadletter.Audit(ctx, c.db, req.GetId())
	if err != nil {
		return nil, publicError(err)
	}
	response := &opsv1.GetDeadLetterResponse{
		Letter: letterOf(letter), Payload: show(letter.Type, letter.Payload), Headers: letter.Headers,
	}
	for _, r := range records {
		response.Audit = append(response.Audit, &opsv1.AuditEntry{
			At: timestamppb.New(r.At), Actor: r.Actor, Action: string(r.Resolution), Reason: r.Reason, Detail: r.Detail,
		})
	}
	return response, nil
}

const (
	// resolveRate is how many dead letters are resolved per second: messages that failed together should not all return
	// at once. A dry run is practically unlimited.
	resolveRate = 200
	dryRunRate  = 1e5
	// reportInterval is the minimum time between two reports of progress.
	reportInterval = 200 * time.Millisecond
)

// ResolveDeadLetters implements ops.v1.OpsService.
func (c *Console) ResolveDeadLetters(
	ctx context.Context, req *opsv1.ResolveDeadLettersRequest,
	stream opsv1connect.OpsServiceResolveDeadLettersServerStream,
) error {
	return c.resolve(ctx, req, stream.Send)
}

func (c *Console) resolve(
	ctx context.Context, req *opsv1.ResolveDeadLettersRequest, send func(*opsv1.ResolveDeadLettersResponse) error,
) error {
	selection, err := c.selectionOf(ctx, req)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	progress := &opsv1.ResolveDeadLettersResponse{}
	var sent time.Time
	var broken error
	report := func() {
		if sent, broken = time.Now(), send(progress); broken != nil {
			stop()
		}
	}
	selection.Begin = func(total int64) {
		progress.Total = total
		report()
	}
	each := func(o ops.Outcome) {
		count(progress, o)
		if broken == nil && time.Since(sent) > reportInterval {
			report()
		}
	}
	do := ops.Discard
	if req.GetResolution() == opsv1.Resolution_RESOLUTION_REDRIVE {
		do = ops.Redrive
	}
	if err := do(ctx, c.db, selection, each); err != nil {
		return errors.Join(broken, publicError(err))
	}
	progress.Done = true
	return send(progress)
}

// selectionOf converts a request.
func (c *Console) selectionOf(ctx context.Context, req *opsv1.ResolveDeadLettersRequest) (ops.Selection, error) {
	filter, err := filterOf(req.GetFilter())
	if err == nil {
		err = storable(req.GetReason())
	}
	filter.Resolved = false
	selection := ops.Selection{
		Filter: filter, Note: note(ctx, req.GetReason()), DryRun: req.GetDryRun(), Force: req.GetForce(),
		PerSecond: resolveRate, Groups: c.operator.Groups,
	}
	if err == nil && selection.Note.Reason == "" {
		err = connect.NewError(connect.CodeInvalidArgument, "reason: must not be empty, since the audit log records it")
	}
	if selection.DryRun {
		selection.PerSecond = dryRunRate
	}
	return selection, err
}

func count(p *opsv1.ResolveDeadLettersResponse, o ops.Outcome) {
	switch {
	case o.Err != nil:
		if p.Unresolved++; p.Problem == "" {
			p.Problem = oneLine(o.Err)
		}
	case o.Resolution == deadletter.Redriven:
		p.Redriven++
	case o.Resolution == deadletter.Duplicate:
		p.Duplicate++
	default:
		p.Discarded++
	}
}

// ReopenDeadLetter implements ops.v1.OpsService.
func (c *Console) ReopenDeadLetter(
	ctx context.Context, req *opsv1.ReopenDeadLetterRequest,
) (*opsv1.ReopenDeadLetterResponse, error) {
	if err := storable(req.GetReason()); err != nil {
		return nil, err
	}
	err := ops.Reopen(ctx, c.db, req.GetId(), note(ctx, req.GetReason()))
	return &opsv1.ReopenDeadLetterResponse{}, publicError(err)
}
