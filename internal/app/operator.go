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
	"example.com/shop/migrations"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Admin gives operators' commands the database and the service's configuration. It runs no part of the service.
type Admin struct {
	DB *pgxpool.Pool
	process
}

// adminConns is enough for one operator.
const adminConns = 4

// OpenAdmin makes an Admin. Connections are opened on first use.
func OpenAdmin(ctx context.Context, config Config) (*Admin, error) {
	db, err := postgres.Open(ctx, postgres.Config{
		URL: config.PostgresURL, MaxConns: adminConns, ApplicationName: ServiceName + " operator",
	})
	if err != nil {
		return nil, err
	}
	a := &Admin{DB: db, process: process{
		config: config, db: db, out: outbox.NewWriter(db, nil, nil), changes: changes.New(changes.Config{}),
	}}
	if err := a.compose(); err != nil {
		db.Close()
		return nil, err
	}
	return a, nil
}

// Close closes the connections.
func (a *Admin) Close() {
	a.closeDomain()
	a.DB.Close()
}

// Groups returns the consumer groups of the domain.
func (a *Admin) Groups() (groups []ops.Group) {
	for _, g := range a.domain.groups {
		groups = append(groups, ops.Group{Name: g.Name(), Types: g.Types()})
	}
	return groups
}

// Acts returns an Operator for all consumer groups, including those of the features.
func (a *Admin) Acts() ops.Operator {
	operator := ops.Operator{DB: a.DB}
	for _, group := range a.groups() {
		operator.Groups = append(operator.Groups, group.Group)
	}
	return operator
}

// Publisher returns a publisher to the exchange or, if a group is given, only to the queue of that group.
func (a *Admin) Publisher(group string) messaging.Publisher {
	config := rabbit.PublisherConfig{URL: a.config.AMQPURL, Topology: a.topology(), Name: a.connectionName("replay")}
	for _, g := range a.domain.groups {
		if g.Name() == group {
			config.Queue = queueName(g)
		}
	}
	return rabbit.NewPublisher(config)
}

// CheckSchema returns an error unless the commands of this binary can work with the schema of the database.
func (a *Admin) CheckSchema(ctx context.Context) error {
	return postgres.Classify(migrations.Check(ctx, a.DB))
}

// CheckBroker returns an error if the broker is unreachable.
func (a *Admin) CheckBroker(ctx context.Context) error { return rabbit.Check(ctx, a.config.AMQPURL) }

// Target returns what the doctor checks.
func (a *Admin) Target() ops.Target {
	return ops.Target{
		DB: a.DB, PostgresURL: a.config.notifyURL(), ListenURL: a.config.listenURL(), AMQPURL: a.config.AMQPURL,
		ManagementURL: a.config.ManagementURL, Topology: a.topology(), LongestRedelivery: longestRedelivery(),
	}
}

// longestHandover is the maximum time between the first and the last time that a page is published: the longest lease,
// five minutes, of a relay that dies with the page, and twice the wait for the confirms.
const longestHandover = 6 * time.Minute

// longestRedelivery returns the maximum time from the publishing of a message to its effect or dead letter while
// everything that it needs is available: the relay's handover, the broker's redeliveries to consumers that never ack,
// and the inbox's retries. There is no limit for a message that waits in a queue for something unavailable, or behind
// another message of its key: the time that the inbox keeps entries beyond this value is for such waits.
func longestRedelivery() time.Duration {
	return longestHandover + rabbit.LongestRedelivery + inboxConfig.LongestRetry()
}

// inboxConfig configures the retries of all consumer groups.
var inboxConfig = inbox.Config{}
