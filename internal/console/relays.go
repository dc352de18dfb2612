package console

import (
	"context"

	opsv1 "example.com/shop/internal/gen/ops/v1"
	"example.com/shop/internal/ops"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// ListRelays implements ops.v1.OpsService.
func (c *Console) ListRelays(ctx context.Context, _ *opsv1.ListRelaysRequest) (*opsv1.ListRelaysResponse, error) {
	shards, err := ops.Shards(ctx, c.db)
	if err != nil {
		return nil, publicError(err)
	}
	relays, err := ops.Relays(ctx, c.db)
	if err != nil {
		return nil, publicError(err)
	}
	response := &opsv1.ListRelaysResponse{}
	for _, s := range shards {
		if !s.Drained {
			response.Shards = append(response.Shards, &opsv1.Shard{
				Shard: int32(s.Shard), Generation: int32(s.Generation), Retired: s.Retired, Owner: s.Owner, Epoch: s.Epoch,
				Backlog: s.Backlog, Lag: s.Lag, Published: s.Published, Parked: s.Parked, MoveTime: timestamppb.New(s.MovedAt),
			})
		}
	}
	for _, r := range relays {
		response.Relays = append(response.Relays, &opsv1.Relay{Owner: r.Owner, Problem: r.Problem})
	}
	return response, nil
}
