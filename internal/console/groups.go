package console

import (
	"context"

	opsv1 "example.com/shop/internal/gen/ops/v1"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/ops"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	maxBlocked = 200
	maxAudit   = 50
)

// ListGroups implements ops.v1.OpsService.
func (c *Console) ListGroups(ctx context.Context, _ *opsv1.ListGroupsRequest) (*opsv1.ListGroupsResponse, error) {
	statuses, err := inbox.GroupStatuses(ctx, c.db, ops.Names(c.operator.Groups))
	if err != nil {
		return nil, publicError(err)
	}
	blocked, err := inbox.Blocked(ctx, c.db, maxBlocked)
	if err != nil {
		return nil, publicError(err)
	}
	entries, err := ops.Log(ctx, c.db, maxAudit)
	if err != nil {
		return nil, publicError(err)
	}
	response := &opsv1.ListGroupsResponse{}
	for i, status := range statuses {
		response.Groups = append(response.Groups, c.groupOf(c.operator.Groups[i], status))
	}
	for _, k := range blocked {
		response.BlockedKeys = append(response.BlockedKeys, &opsv1.BlockedKey{
			Group: k.Consumer, Key: k.Key, Waiting: int64(k.Waiting), Since: timestamppb.New(k.Since), MessageId: k.MessageID,
			Attempts: int32(k.Attempts), DueTime: timestamppb.New(k.DueAt), LastError: k.LastError,
		})
	}
	for _, e := range entries {
		response.Audit = append(response.Audit, &opsv1.AuditEntry{
			At: timestamppb.New(e.At), Actor: e.Actor, Action: e.Action, Target: e.Target, Reason: e.Reason, Detail: e.Detail,
		})
	}
	return response, nil
}

// groupOf combines a group's status in the database with the rate and queue depth from the flow.
func (c *Console) groupOf(group ops.Group, status inbox.GroupStatus) *opsv1.Group {
	g := &opsv1.Group{
		Name: group.Name, Types: group.Types, Processes: int32(len(status.Applied)), Lag: status.Lag,
		Retrying: status.Retrying, Oldest: status.Oldest, BlockedKeys: status.Blocked,
	}
	if pause := status.Paused; pause != nil {
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
	return &opsv1.PauseGroupResponse{}, publicError(c.operator.Pause(ctx, req.GetGroup(), note(ctx, req.GetReason())))
}

// ResumeGroup implements ops.v1.OpsService.
func (c *Console) ResumeGroup(ctx context.Context, req *opsv1.ResumeGroupRequest) (*opsv1.ResumeGroupResponse, error) {
	if err := storable(req.GetGroup(), req.GetReason()); err != nil {
		return nil, err
	}
	return &opsv1.ResumeGroupResponse{}, publicError(c.operator.Resume(ctx, req.GetGroup(), note(ctx, req.GetReason())))
}

// BuryKey implements ops.v1.OpsService.
func (c *Console) BuryKey(ctx context.Context, req *opsv1.BuryKeyRequest) (*opsv1.BuryKeyResponse, error) {
	if err := storable(req.GetGroup(), req.GetKey(), req.GetReason()); err != nil {
		return nil, err
	}
	if req.GetWhole() {
		moved, err := c.operator.ParkKey(ctx, req.GetGroup(), req.GetKey(), note(ctx, req.GetReason()))
		return &opsv1.BuryKeyResponse{Moved: int64(moved)}, publicError(err)
	}
	_, err := c.operator.SkipHead(ctx, req.GetGroup(), req.GetKey(), note(ctx, req.GetReason()))
	return &opsv1.BuryKeyResponse{Moved: 1}, publicError(err)
}
