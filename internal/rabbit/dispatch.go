package rabbit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

var errDeliveriesEnded = errors.New("the broker stopped the deliveries")

// quietTime is how long no delivery must arrive before dispatch assumes that everything the broker has sent is here. A
// delivery that it misses does no harm, but the broker counts it as delivered once when the next consumer gets it.
const quietTime = 50 * time.Millisecond

// dispatch passes deliveries to their lanes and acks the handled ones, until the library closes source. That happens
// when the connection ends, and also when the queue is deleted; connection and channel then stay open. dispatch
// returns nil if ctx ended it and everything is settled.
//
// When ctx ends, dispatch finishes the received deliveries but withholds their acks until all of them are done. As soon
// as this consumer cancels or closes, the broker activates the queue's next consumer, even if deliveries are still
// unacked here; and it sends more deliveries for each ack. So no other consumer may start until nothing is unfinished
// here: otherwise it would overtake this one on the same key.
func (c *Consumer) dispatch(
	ctx context.Context, conn *Connection, channel *amqp.Channel, source <-chan amqp.Delivery,
) error {
	// Handlers outlive ctx, so that they finish the deliveries that they have started. They end with the drain timeout or
	// with this connection.
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	lanes := c.startLanes(work)
	defer lanes.wait()
	defer cancel()

	ending := ctx.Done()
	var quiet, ackTime <-chan time.Time
	var handled acks
	for stopping, unfinished, over := false, 0, false; !over; {
		select {
		case delivery, open := <-source:
			if !open {
				return errDeliveriesEnded // acks are no longer possible: unacked messages are redelivered
			}
			unfinished++
			c.hand(work, lanes, delivery)
		case batch := <-lanes.handled:
			unfinished -= len(batch)
			for i := range batch {
				handled.add(batch[i].DeliveryTag)
				conn.Release(len(batch[i].Body))
			}
			if !stopping && len(handled.waiting) >= c.ackSize(unfinished) {
				if err := sendAcks(channel, &handled); err != nil {
					return err
				}
			}
		case <-ackTime:
			ackTime = nil
			if err := sendAcks(channel, &handled); err != nil {
				return err
			}
		case <-ending:
			stopping, ending = true, nil
			expiry := time.AfterFunc(c.config.DrainTimeout, cancel)
			defer expiry.Stop()
		case <-work.Done():
			return sendAcks(channel, &handled)
		case <-quiet:
			over = true
		}
		switch quiet = nil; {
		case stopping:
			ackTime = nil
		case ackTime == nil && len(handled.waiting) > 0:
			ackTime = time.After(ackInterval)
		}
		if stopping && unfinished == 0 {
			over = over || len(handled.waiting) >= c.config.Prefetch
			quiet = time.After(quietTime)
		}
	}
	if len(handled.waiting) >= c.config.Prefetch {
		// The prefetch is exhausted, so no delivery is in flight that the cancel could lose. Without the cancel, the acks
		// would make the broker send more, and those messages would be redelivered after the connection ends.
		_ = channel.Cancel(consumerTag, true) // fails only if the connection is gone, and then the ack fails too
	}
	return sendAcks(channel, &handled)
}

// laneOf keeps deliveries of one key in one lane, and spreads those without a key.
func (c *Consumer) laneOf(d *amqp.Delivery) int {
	if c.config.Lanes == 1 {
		return 0
	}
	key, _ := keyOf(d)
	return int(hash(cmp.Or(key, d.MessageId)) % uint32(c.config.Lanes))
}

// ackSize is the number of batched acks that are sent without further delay, so that the broker does not exhaust the
// prefetch. With one lane, this is a quarter of the prefetch. Otherwise some unfinished deliveries may be stuck, so
// it is a quarter of the rest.
func (c *Consumer) ackSize(unfinished int) int {
	moving := c.config.Prefetch
	if c.config.Lanes > 1 || c.config.Unordered {
		moving -= unfinished
	}
	return moving / 4
}

// sendAcks acks all handled deliveries.
func sendAcks(channel *amqp.Channel, handled *acks) error {
	upTo, single := handled.next()
	var err error
	if upTo > 0 {
		err = channel.Ack(upTo, true)
	}
	for _, tag := range single {
		err = cmp.Or(err, channel.Ack(tag, false))
	}
	if err != nil {
		// The connection is gone. The messages are redelivered, and the inbox drops the duplicates.
		return fmt.Errorf("ack: %w", err)
	}
	return nil
}
