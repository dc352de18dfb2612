package main

import (
	"context"
	stdsql "database/sql"
	"errors"
	"time"

	"example.com/shop/internal/messaging"
	"github.com/ThreeDotsLabs/watermill"
	wamqp "github.com/ThreeDotsLabs/watermill-amqp/v3/pkg/amqp"
	wsql "github.com/ThreeDotsLabs/watermill-sql/v3/pkg/sql"
	"github.com/ThreeDotsLabs/watermill/components/forwarder"
	"github.com/ThreeDotsLabs/watermill/message"
	_ "github.com/lib/pq" // the driver in Watermill's documentation
	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	watermillTopic = "forward"
	watermillBatch = 1000
)

var watermillSchema = wsql.DefaultPostgreSQLSchema{SubscribeBatchSize: watermillBatch}

// watermillForwarder is Watermill's outbox: its SQL publisher stores messages in the business transaction, and its
// forwarder publishes the messages that the SQL subscriber reads.
var watermillForwarder = peer{
	name: "watermill",
	prepare: func(ctx context.Context, url string) error {
		var statements []string
		for _, query := range watermillSchema.SchemaInitializingQueries(watermillTopic) {
			statements = append(statements, query.Query)
		}
		return execute(ctx, url, statements...)
	},
	insert: func(ctx context.Context, url string) (insertFunc, func(), error) {
		db, err := stdsql.Open("postgres", url+" sslmode=disable")
		if err != nil {
			return nil, nil, err
		}
		db.SetMaxIdleConns(10)
		return func(ctx context.Context, messages ...messaging.Message) error {
			return insertWatermill(ctx, db, messages)
		}, func() { db.Close() }, nil
	},
	relay: runWatermill,
}

func insertWatermill(ctx context.Context, db *stdsql.DB, messages []messaging.Message) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	var publisher message.Publisher
	publisher, err = wsql.NewPublisher(tx, wsql.PublisherConfig{SchemaAdapter: watermillSchema}, watermill.NopLogger{})
	if err != nil {
		return err
	}
	publisher = forwarder.NewPublisher(publisher, forwarder.PublisherConfig{ForwarderTopic: watermillTopic})
	all := make([]*message.Message, len(messages))
	for i, m := range messages {
		all[i] = message.NewMessage(m.ID.String(), m.Payload)
		all[i].Metadata.Set(messaging.KeyHeader, m.Key)
	}
	if err := publisher.Publish(messages[0].Type, all...); err != nil {
		return err
	}
	return tx.Commit()
}

func runWatermill(ctx context.Context, b *bench, url string, confirmed func(id string)) error {
	db, err := stdsql.Open("postgres", url+" sslmode=disable")
	if err != nil {
		return err
	}
	defer db.Close()
	from, err := wsql.NewSubscriber(db, wsql.SubscriberConfig{
		ConsumerGroup: "forwarder", SchemaAdapter: watermillSchema,
		OffsetsAdapter: wsql.DefaultPostgreSQLOffsetsAdapter{},
		PollInterval:   10 * time.Millisecond, InitializeSchema: true,
	}, watermill.NopLogger{})
	if err != nil {
		return err
	}
	config := wamqp.NewDurableTopicConfig(b.AMQPURL, exchange, queue)
	config.Exchange.Durable = true
	config.Publish.ConfirmDelivery, config.Publish.ChannelPoolSize, config.Publish.Mandatory = true, 1, true
	config.Marshaler = wamqp.DefaultMarshaler{PostprocessPublishing: func(p amqp.Publishing) amqp.Publishing {
		p.Type, p.ContentType = messageType, "application/protobuf"
		p.MessageId, _ = p.Headers[wamqp.DefaultMessageUUIDHeaderKey].(string)
		return p
	}}
	to, err := wamqp.NewPublisher(config, watermill.NopLogger{})
	if err != nil {
		return err
	}
	defer to.Close()
	forward, err := forwarder.NewForwarder(from, &watermillWatch{to, confirmed}, watermill.NopLogger{},
		forwarder.Config{ForwarderTopic: watermillTopic, CloseTimeout: time.Second})
	if err != nil {
		return err
	}
	over := make(chan error, 1)
	go func() { over <- forward.Run(context.WithoutCancel(ctx)) }()
	select {
	case err := <-over:
		return err
	case <-ctx.Done():
		return errors.Join(forward.Close(), from.Close())
	}
}

// watermillWatch reports confirmed messages. Publish returns only after the confirm.
type watermillWatch struct {
	message.Publisher
	confirmed func(id string)
}

func (w *watermillWatch) Publish(topic string, messages ...*message.Message) error {
	err := w.Publisher.Publish(topic, messages...)
	for _, m := range messages {
		if err == nil {
			w.confirmed(m.UUID)
		}
	}
	return err
}
