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

// ServiceName is the service's name on the broker and for operators; queue names begin with it.
const ServiceName = "shop"

// domain is everything that the core knows about the domain. No other file of the core imports the domain.
type domain struct {
	register func(*connect.Server)
	groups   []group
	// publishes lists the proto packages of the service's events, unless its RPC services are in the same package. On the
	// broker, the service may publish the events of its own packages only.
	publishes []string
}

// group is a consumer group with the number of batches that it handles at once. Use more than one lane if one does not
// keep up. Use one lane if handlers lock rows that many keys share, such as stock: more lanes would wait for each other
// in the database, or deadlock and retry.
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
