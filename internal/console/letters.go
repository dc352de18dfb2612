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
	return deadletter.Filter{
			IDs: f.GetIds(), Consumer: f.GetGroup(), MessageID: f.GetMessageId(), Type: f.GetType(), Key: f.GetKey(),
			Reason: deadletter.Reason(f.GetCause()),
			Since:  moment(f.GetSince()), Until: moment(f.GetUntil()), Resolved: f.GetResolved(),
		}, cmp.Or(storable(f.GetGroup(), f.GetMessageId(), f.GetType(), f.GetKey(), f.GetCause()),
			dated(f.GetSince(), f.GetUntil()))
}

// ListDeadLetters implements ops.v1.OpsService.
func (c *Console) ListDeadLetters(
	ctx context.Context, req *opsv1.ListDeadLettersRequest,
) (*opsv1.ListDeadLettersResponse, error) {
	filter, err := filterOf(req.GetFilter())
	if err != nil {
		return nil, err
	}
	// One more, to know whether there are more.
	letters, err := deadletter.Newest(ctx, c.db, filter, req.GetPageToken(), pageRows+1)
	if err != nil {
		return nil, tell(err)
	}
	response := &opsv1.ListDeadLettersResponse{}
	if len(letters) > pageRows {
		letters = letters[:pageRows]
		response.NextPageToken = letters[pageRows-1].ID
	}
	for _, one := range letters {
		response.Letters = append(response.Letters, letterOf(one))
	}
	if req.GetCount() {
		response.Count, _, err = deadletter.Count(ctx, c.db, filter)
	}
	return response, tell(err)
}

func letterOf(l deadletter.Stored) *opsv1.DeadLetter {
	return &opsv1.DeadLetter{
		Id: l.ID, Group: cmp.Or(l.Consumer, deadletter.Relay), MessageId: l.MessageID, Type: l.Type, Key: l.Key,
		Cause: string(l.Reason), Error: l.Error,
		Attempts: int32(l.Attempts), DeadTime: timestamppb.New(l.DeadAt), Resolution: string(l.Resolution),
		ResolveTime: stamp(l.ResolvedAt),
	}
}

// GetDeadLetter implements ops.v1.OpsService.
func (c *Console) GetDeadLetter(
	ctx context.Context, req *opsv1.GetDeadLetterRequest,
) (*opsv1.GetDeadLetterResponse, error) {
	letter, found, err := deadletter.Get(ctx, c.db, req.GetId())
	switch {
	case err != nil:
		return nil, tell(err)
	case !found:
		return nil, connect.Errorf(connect.CodeNotFound, "there is no dead letter %d", req.GetId())
	}
	records, err := deadletter.Audit(ctx, c.db, req.GetId())
	if err != nil {
		return nil, tell(err)
	}
	response := &opsv1.GetDeadLetterResponse{
		Letter: letterOf(letter), Payload: show(letter.Type, letter.Payload), Headers: letter.Headers,
	}
	for _, one := range records {
		response.Audit = append(response.Audit, &opsv1.AuditEntry{
			At: timestamppb.New(one.At), Actor: one.Actor, Action: string(one.Resolution), Reason: one.Reason,
			Detail: one.Detail,
		})
	}
	return response, nil
}

const (
	// pace is how many letters a second are resolved: what failed together should not come back at once. A dry run takes
	// what it can get.
	pace    = 200
	dryPace = 1e5
	// tellEvery is how often progress is told.
	tellEvery = 200 * time.Millisecond
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
	order, err := c.orderOf(ctx, req)
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
	order.Begin = func(total int64) {
		progress.Total = total
		report()
	}
	each := func(o ops.Outcome) {
		count(progress, o)
		if broken == nil && time.Since(sent) > tellEvery {
			report()
		}
	}
	do := ops.Discard
	if req.GetResolution() == opsv1.Resolution_RESOLUTION_REDRIVE {
		do = ops.Redrive
	}
	if err := do(ctx, c.db, order, each); err != nil {
		return errors.Join(broken, tell(err))
	}
	progress.Done = true
	return send(progress)
}

// orderOf is what a request asks for.
func (c *Console) orderOf(ctx context.Context, req *opsv1.ResolveDeadLettersRequest) (ops.Selection, error) {
	filter, err := filterOf(req.GetFilter())
	if err == nil {
		err = storable(req.GetReason())
	}
	filter.Resolved = false
	order := ops.Selection{
		Filter: filter, Note: note(ctx, req.GetReason()), DryRun: req.GetDryRun(), Force: req.GetForce(),
		PerSecond: pace, Groups: c.desk.Groups,
	}
	if err == nil && order.Note.Reason == "" {
		err = connect.NewError(connect.CodeInvalidArgument, "reason: is empty; it is kept in the audit log")
	}
	if order.DryRun {
		order.PerSecond = dryPace
	}
	return order, err
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
	return &opsv1.ReopenDeadLetterResponse{}, tell(ops.Reopen(ctx, c.db, req.GetId(), note(ctx, req.GetReason())))
}
