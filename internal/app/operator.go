package app

import (
	"context"
	"time"

	"example.com/shop/internal/changes"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Admin is what operators' commands work at: the database, and what the service's wiring knows. It runs nothing.
type Admin struct {
	DB *pgxpool.Pool
	process
}

// deskConns is enough for a person.
const deskConns = 4

// OpenAdmin opens the connections. It does not connect.
func OpenAdmin(ctx context.Context, config Config) (*Admin, error) {
	db, err := postgres.Open(ctx, postgres.Config{URL: config.PostgresURL, MaxConns: deskConns, ApplicationName: ServiceName + " operator"})
	if err != nil {
		return nil, err
	}
	return &Admin{DB: db, process: process{config: config, db: db, domain: defaultDomain(db, outbox.NewWriter(db, nil, nil), changes.New(changes.Config{}))}}, nil
}

// Close closes the connections.
func (d *Admin) Close() { d.DB.Close() }

// Groups are the service's consumer groups.
func (d *Admin) Groups() (groups []ops.Group) {
	for _, g := range d.domain.groups {
		groups = append(groups, ops.Group{Name: g.Name(), Types: g.Types()})
	}
	return groups
}

// Acts is what operators do to consumer groups, that of durable calls among them.
func (d *Admin) Acts() ops.Operator {
	acts := ops.Operator{DB: d.DB}
	for _, group := range d.consoleGroups() {
		acts.Groups = append(acts.Groups, group.Name)
	}
	return acts
}

// Publisher publishes to the exchange, or, if a group is given, to that group's queue alone.
func (d *Admin) Publisher(group string) messaging.Publisher {
	config := rabbit.PublisherConfig{URL: d.config.AMQPURL, Topology: d.topology(), Name: d.connectionName("replay")}
	for _, g := range d.domain.groups {
		if g.Name() == group {
			config.Queue = queueName(g)
		}
	}
	return rabbit.NewPublisher(config)
}

// CheckBroker says why the broker cannot be reached.
func (d *Admin) CheckBroker(ctx context.Context) error { return rabbit.Check(ctx, d.config.AMQPURL) }

// Target is the service as the doctor looks at it.
func (d *Admin) Target() ops.Target {
	return ops.Target{
		DB: d.DB, PostgresURL: d.config.notifyURL(), ListenURL: d.config.listenURL(), AMQPURL: d.config.AMQPURL,
		ManagementURL: d.config.ManagementURL, Topology: d.topology(), LongestRedelivery: longestRedelivery(),
	}
}

// longestHandover is how long a page may take from its first publishing to its last: the longest lease of a relay that dies with it, five minutes, and
// the wait for the confirms, twice.
const longestHandover = 6 * time.Minute

// longestRedelivery is how long a message may be under way from its publishing to its effect or its dead letter while everything that is needed is
// there: the relay's handover, the broker's redeliveries to consumers that take it and never ack, and then the inbox's retries. A message that
// waits for something that is away, in a queue or behind another of its key, takes longer, without limit; what the inbox remembers
// beyond this is the time for that.
func longestRedelivery() time.Duration {
	return longestHandover + rabbit.LongestRedelivery + inboxConfig.LongestRetry()
}

// inboxConfig is how all consumer groups try again.
var inboxConfig = inbox.Config{}
