package rabbit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

var errDeliveriesEnded = errors.New("the broker ended the deliveries")

// quietTime is how long nothing must come before the deliveries that the broker has sent are taken to be all here. One that is missed does no
// harm, but it counts as handed out once when the next consumer gets it.
const quietTime = 50 * time.Millisecond

// dispatch hands deliveries to their lanes and acks what comes back, until source is closed: by the library, when the connection ends, and
// also when the queue is deleted, when connection and channel stay open. It returns nil if ctx ended it and everything is settled.
//
// At the end of ctx it works off what was delivered, but withholds the acks until all of it is done. The broker makes the next consumer of
// the queue the active one as soon as this one cancels or closes, whatever is still unacked here; and it sends more for each ack. So
// only when nothing is unfinished here may another one begin: else it would overtake us on the same key.
func (c *Consumer) dispatch(ctx context.Context, conn *Connection, channel *amqp.Channel, source <-chan amqp.Delivery) error {
	// Handlers outlive ctx: a delivery that was begun is finished. They end with the drain timeout, or with this connection.
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
				return errDeliveriesEnded // and with them the acks: what is not acked is delivered again
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
		// The broker could send nothing more, so nothing is under way that would be cut off. With the acks it would send again, to be
		// handed out a second time after the end of the connection.
		_ = channel.Cancel(consumerTag, true) // fails only if the connection is gone, and then so does the ack
	}
	return sendAcks(channel, &handled)
}

// laneOf keeps the deliveries of one key together, and spreads those without a key.
func (c *Consumer) laneOf(d *amqp.Delivery) int {
	if c.config.Lanes == 1 {
		return 0
	}
	key, _ := keyOf(d)
	return int(hash(cmp.Or(key, d.MessageId)) % uint32(c.config.Lanes))
}

// ackSize is how many acks are not gathered any longer, so that the broker does not run out of what it may send. With one lane, that is a quarter of
// all it may. Otherwise some of the unfinished deliveries may be stuck, and it has to do with the rest.
func (c *Consumer) ackSize(unfinished int) int {
	moving := c.config.Prefetch
	if c.config.Lanes > 1 || c.config.Unordered {
		moving -= unfinished
	}
	return moving / 4
}

// sendAcks acks all that is handled.
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
		// The connection is gone. All copies that come again are duplicates to the inbox.
		return fmt.Errorf("ack: %w", err)
	}
	return nil
}
