package console

import (
	"cmp"
	"context"
	"errors"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/orders/internal/deadletter"
	opsv1 "example.com/orders/internal/gen/ops/v1"
	"example.com/orders/internal/gen/ops/v1/opsv1connect"
	"example.com/orders/internal/ops"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func filterOf(f *opsv1.DeadLetterFilter) (deadletter.Filter, error) {
	return deadletter.Filter{
		IDs: f.GetIds(), Consumer: f.GetGroup(), MessageID: f.GetMessageId(), Type: f.GetType(), Key: f.GetKey(), Reason: deadletter.Reason(f.GetCause()),
		Since: moment(f.GetSince()), Until: moment(f.GetUntil()), Resolved: f.GetResolved(),
	}, cmp.Or(storable(f.GetGroup(), f.GetMessageId(), f.GetType(), f.GetKey(), f.GetCause()), dated(f.GetSince(), f.GetUntil()))
}

// ListDeadLetters implements ops.v1.OpsService.
func (c *Console) ListDeadLetters(ctx context.Context, req *opsv1.ListDeadLettersRequest) (*opsv1.ListDeadLettersResponse, error) {
	filter, err := filterOf(req.GetFilter())
	if err != nil {
		return nil, err
	}
	letters, err := deadletter.Newest(ctx, c.db, filter, req.GetPageToken(), pageRows+1) // one more, to know whether there are more
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
		response.Count, err = deadletter.Count(ctx, c.db, filter)
	}
	return response, tell(err)
}

func letterOf(l deadletter.Stored) *opsv1.DeadLetter {
	return &opsv1.DeadLetter{
		Id: l.ID, Group: cmp.Or(l.Consumer, deadletter.Relay), MessageId: l.MessageID, Type: l.Type, Key: l.Key, Cause: string(l.Reason), Error: l.Error,
		Attempts: int32(l.Attempts), DeadTime: timestamppb.New(l.DeadAt), Resolution: string(l.Resolution), ResolveTime: stamp(l.ResolvedAt),
	}
}

// GetDeadLetter implements ops.v1.OpsService.
func (c *Console) GetDeadLetter(ctx context.Context, req *opsv1.GetDeadLetterRequest) (*opsv1.GetDeadLetterResponse, error) {
	found, err := deadletter.List(ctx, c.db, deadletter.Filter{IDs: []int64{req.GetId()}, Resolved: true}, 0, 1)
	switch {
	case err != nil:
		return nil, tell(err)
	case len(found) == 0:
		return nil, connect.Errorf(connect.CodeNotFound, "there is no dead letter %d", req.GetId())
	}
	records, err := deadletter.Audit(ctx, c.db, req.GetId())
	if err != nil {
		return nil, tell(err)
	}
	response := &opsv1.GetDeadLetterResponse{
		Letter: letterOf(found[0]), Payload: show(found[0].Type, found[0].Payload), Headers: found[0].Headers,
	}
	for _, one := range records {
		response.Audit = append(response.Audit, &opsv1.AuditEntry{
			At: timestamppb.New(one.At), Actor: one.Actor, Action: string(one.Resolution), Reason: one.Reason, Detail: one.Detail,
		})
	}
	return response, nil
}

const (
	// pace is how many letters a second are resolved: what failed together should not come back at once. A dry run takes what it can get.
	pace    = 200
	dryPace = 1e5
	// tellEvery is how often progress is told.
	tellEvery = 200 * time.Millisecond
)

// ResolveDeadLetters implements ops.v1.OpsService.
func (c *Console) ResolveDeadLetters(ctx context.Context, req *opsv1.ResolveDeadLettersRequest, stream opsv1connect.OpsServiceResolveDeadLettersServerStream) error {
	return c.resolve(ctx, req, stream.Send)
}

func (c *Console) resolve(ctx context.Context, req *opsv1.ResolveDeadLettersRequest, send func(*opsv1.ResolveDeadLettersResponse) error) error {
	filter, err := filterOf(req.GetFilter())
	if err == nil {
		err = storable(req.GetReason())
	}
	if err != nil {
		return err
	}
	filter.Resolved = false
	if len(filter.IDs) == 0 && filter.Until.IsZero() {
		filter.Until = time.Now() // what is redriven and dies again is another letter, and not to be redriven for ever
	}
	progress := &opsv1.ResolveDeadLettersResponse{}
	if progress.Total, err = deadletter.Count(ctx, c.db, filter); err != nil {
		return tell(err)
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	told, broken := time.Now(), send(progress)
	each := func(o ops.Outcome) {
		count(progress, o)
		if broken == nil && time.Since(told) > tellEvery {
			told, broken = time.Now(), send(progress)
		}
		if broken != nil {
			stop()
		}
	}
	order := ops.Order{Filter: filter, Note: note(ctx, req.GetReason()), DryRun: req.GetDryRun(), Force: req.GetForce(), PerSecond: pace, Groups: c.redrivable()}
	if order.Note.Reason == "" {
		return connect.NewError(connect.CodeInvalidArgument, "reason: is empty; it is kept in the audit log")
	}
	if order.DryRun {
		order.PerSecond = dryPace
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

// redrivable are the groups whose messages can be tried again. An operation whose message died has failed, and its caller was told so.
func (c *Console) redrivable() (names []string) {
	for _, group := range c.config.Groups {
		if !group.Final {
			names = append(names, group.Name)
		}
	}
	return names
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
func (c *Console) ReopenDeadLetter(ctx context.Context, req *opsv1.ReopenDeadLetterRequest) (*opsv1.ReopenDeadLetterResponse, error) {
	if err := storable(req.GetReason()); err != nil {
		return nil, err
	}
	return &opsv1.ReopenDeadLetterResponse{}, tell(ops.Reopen(ctx, c.db, req.GetId(), note(ctx, req.GetReason())))
}
