package app

import (
	"fmt"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/gen/orders/v1/ordersv1connect"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/orders"
)

// ServiceName is the service's name on the broker and for operators; queue names begin with it.
const ServiceName = "shop"

// DomainConfig is the domain's own configuration: each field is a flag and an environment variable of the processes
// that serve calls or handle messages. `make docs` lists them in docs/configuration.md.
type DomainConfig struct {
	ListPageSize int `env:"LIST_PAGE_SIZE" default:"50" help:"Page size of lists if the caller names none, 1 to 1000."`
}

// Validate returns an error if a value is wrong; the process then does not start.
func (c DomainConfig) Validate() error {
	if c.ListPageSize < 1 || c.ListPageSize > 1000 {
		return fmt.Errorf("--list-page-size: %d is not between 1 and 1000", c.ListPageSize)
	}
	return nil
}

// domain is everything that the core knows about the domain. No other file of the core imports the domain.
type domain struct {
	register func(*connect.Server)
	groups   []group
	// publishes lists the proto packages of the service's events, unless its RPC services are in the same package. On the
	// broker, the service may publish the events of its own packages only.
	publishes []string
	// close releases what newDomain opened, such as clients, once no call and no handler runs; nil for nothing.
	close func()
}

// group is a consumer group with the number of batches that it handles at once. Use more than one lane if one does not
// keep up. Use one lane if handlers lock rows that many keys share, such as stock: more lanes would wait for each other
// in the database, or deadlock and retry.
type group struct {
	*inbox.Group
	lanes int
}

// newDomain wires the service. An error ends the process.
func newDomain(d deps) (domain, error) {
	service := orders.NewService(d.db, d.out, d.changes, orders.Config{PageSize: d.config.ListPageSize})
	return domain{
		register: func(s *connect.Server) { ordersv1connect.RegisterOrderServiceHandler(s, service) },
		groups: []group{
			{service.Fulfillment(), 1},
			{service.Notifications(), 1},
		},
	}, nil
}
