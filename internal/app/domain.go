package app

import (
	"connectrpc.com/connect/v2"
	"example.com/shop/internal/changes"
	"example.com/shop/internal/gen/orders/v1/ordersv1connect"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/orders"
	"example.com/shop/internal/outbox"
	"github.com/jackc/pgx/v5/pgxpool"
)

// ServiceName names the service to the broker and to the operator: queues are called after it.
const ServiceName = "shop"

// domain is all that the core knows of the service. This file is the only one of the core that names it.
type domain struct {
	register func(*connect.Server)
	groups   []group
}

// group is a consumer group, and how many of its batches may be handled at once: more than one where one does not keep up. Handlers that lock rows
// which many keys share, as stock is, want one lane: more would wait for each other in the database, or deadlock and start again.
type group struct {
	*inbox.Group
	lanes int
}

func newDomain(db *pgxpool.Pool, out *outbox.Writer, hub *changes.Hub) domain {
	service := orders.NewService(db, out, hub)
	return domain{
		register: func(s *connect.Server) { ordersv1connect.RegisterOrderServiceHandler(s, service) },
		groups: []group{
			{service.Fulfillment(), 1},
			{service.Notifications(), 1},
		},
	}
}
