package outbox

import (
	"errors"
	"fmt"
	"time"

	"example.com/shop/internal/postgres"
)

// ErrClock means that a message was not inserted because of the time in its ID: by the database's clock it lies more
// than ten minutes ahead, or six days back. As a rule the message is right and the clock of this machine is not, and a
// process on another machine can write it. Nothing was written.
var ErrClock = errors.New("this machine's clock and Postgres' differ")

// MaxAge is how old the ID of a message may be when it is inserted; outbox_oldest is the same in SQL. Consumers take a
// message for almost a day longer, as much as it may be under way.
const MaxAge = 6 * 24 * time.Hour

// clockConstraint is the name under which Postgres refuses such a message.
const clockConstraint = "outbox_message_id_is_timely"

// blameClock makes ErrClock of what Postgres refused for the time in an ID.
func blameClock(err error) error {
	if postgres.Violates(err, clockConstraint) {
		return fmt.Errorf("%w: %w", ErrClock, err)
	}
	return err
}
