package console

import (
	"context"

	opsv1 "example.com/shop/internal/gen/ops/v1"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/ops"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	mostBlocked = 200
	mostAudit   = 50
)

// ListGroups implements ops.v1.OpsService.
func (c *Console) ListGroups(ctx context.Context, _ *opsv1.ListGroupsRequest) (*opsv1.ListGroupsResponse, error) {
	standings, err := inbox.GroupStatuses(ctx, c.db, c.desk.Groups)
	if err != nil {
		return nil, tell(err)
	}
	blocked, err := inbox.Blocked(ctx, c.db, mostBlocked)
	if err != nil {
		return nil, tell(err)
	}
	entries, err := ops.Log(ctx, c.db, mostAudit)
	if err != nil {
		return nil, tell(err)
	}
	response := &opsv1.ListGroupsResponse{}
	for i, standing := range standings {
		response.Groups = append(response.Groups, c.groupOf(c.groups[i], standing))
	}
	for _, one := range blocked {
		response.BlockedKeys = append(response.BlockedKeys, &opsv1.BlockedKey{
			Group: one.Consumer, Key: one.Key, Waiting: int64(one.Waiting), Since: timestamppb.New(one.Since),
			MessageId: one.MessageID,
			Attempts:  int32(one.Attempts), DueTime: timestamppb.New(one.DueAt), LastError: one.LastError,
		})
	}
	for _, one := range entries {
		response.Audit = append(response.Audit, &opsv1.AuditEntry{
			At: timestamppb.New(one.At), Actor: one.Actor, Action: one.Action, Target: one.Target, Reason: one.Reason,
			Detail: one.Detail,
		})
	}
	return response, nil
}

// groupOf joins what the database says of a group with what the flow knows: its rate, and how full its queue is.
func (c *Console) groupOf(group ops.Group, standing inbox.GroupStatus) *opsv1.Group {
	g := &opsv1.Group{
		Name: group.Name, Types: group.Types, Processes: int32(len(standing.Applied)), Lag: standing.Lag,
		Retrying: standing.Retrying, Oldest: standing.Oldest, BlockedKeys: standing.Blocked,
	}
	if pause := standing.Paused; pause != nil {
		g.PausedBy, g.PauseReason, g.PauseTime = pause.Actor, pause.Reason, timestamppb.New(pause.At)
	}
	sample, _ := c.flow.now()
	for _, station := range sample.GetStations() {
		switch {
		case station.GetGroup() != group.Name:
		case station.GetKind() == opsv1.StationKind_STATION_KIND_QUEUE:
			g.Queued = station.Waiting
		case station.GetKind() == opsv1.StationKind_STATION_KIND_GROUP:
			g.Rate = station.GetRate()
		}
	}
	return g
}

// PauseGroup implements ops.v1.OpsService.
func (c *Console) PauseGroup(ctx context.Context, req *opsv1.PauseGroupRequest) (*opsv1.PauseGroupResponse, error) {
	if err := storable(req.GetGroup(), req.GetReason()); err != nil {
		return nil, err
	}
	return &opsv1.PauseGroupResponse{}, tell(c.desk.Pause(ctx, req.GetGroup(), note(ctx, req.GetReason())))
}

// ResumeGroup implements ops.v1.OpsService.
func (c *Console) ResumeGroup(ctx context.Context, req *opsv1.ResumeGroupRequest) (*opsv1.ResumeGroupResponse, error) {
	if err := storable(req.GetGroup(), req.GetReason()); err != nil {
		return nil, err
	}
	return &opsv1.ResumeGroupResponse{}, tell(c.desk.Resume(ctx, req.GetGroup(), note(ctx, req.GetReason())))
}

// BuryKey implements ops.v1.OpsService.
func (c *Console) BuryKey(ctx context.Context, req *opsv1.BuryKeyRequest) (*opsv1.BuryKeyResponse, error) {
	if err := storable(req.GetGroup(), req.GetKey(), req.GetReason()); err != nil {
		return nil, err
	}
	if req.GetWhole() {
		moved, err := c.desk.ParkKey(ctx, req.GetGroup(), req.GetKey(), note(ctx, req.GetReason()))
		return &opsv1.BuryKeyResponse{Moved: int64(moved)}, tell(err)
	}
	_, err := c.desk.SkipHead(ctx, req.GetGroup(), req.GetKey(), note(ctx, req.GetReason()))
	return &opsv1.BuryKeyResponse{Moved: 1}, tell(err)
}
