package outbox

import (
	"errors"
	"fmt"
	"time"

	"example.com/shop/internal/postgres"
)

// ErrClock means that nothing was written because of the time in a message's ID: by the database's clock, that time is
// more than ten minutes in the future or more than six days in the past. Usually the message is right and this
// machine's clock is wrong, and a process on another machine can insert the message.
var ErrClock = errors.New("this machine's clock and Postgres' differ")

// MaxAge is how old the ID of a message may be when it is inserted; outbox_oldest is the same in SQL. Consumers accept
// a message for almost a day longer, which is the time that it may be in transit.
const MaxAge = 6 * 24 * time.Hour

// clockConstraint is the constraint by which Postgres refuses such a message.
const clockConstraint = "outbox_message_id_is_timely"

// blameClock wraps err in ErrClock if Postgres refused a message for the time in its ID.
func blameClock(err error) error {
	if postgres.Violates(err, clockConstraint) {
		return fmt.Errorf("%w: %w", ErrClock, err)
	}
	return err
}
