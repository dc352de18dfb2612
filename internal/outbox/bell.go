package outbox

import (
	"context"
	"fmt"
	"time"

	"example.com/orders/internal/postgres"
	"github.com/jackc/pgx/v5"
)

// channel is the Postgres notification channel of the doorbell.
const channel = "outbox"

// Bell tells the relay that there may be something new. Ring never blocks, and any number of rings may become one:
// the relay reads until nothing is left, so all that counts is that a ring follows the last commit.
type Bell interface {
	Ring()
}

// LocalBell is the doorbell of a relay in the same process, and what the relay itself waits on.
type LocalBell chan struct{}

// NewLocalBell makes a LocalBell.
func NewLocalBell() LocalBell { return make(LocalBell, 1) }

// Ring wakes the relay, now or when it next looks.
func (b LocalBell) Ring() {
	select {
	case b <- struct{}{}:
	default: // one ring is waiting already, and it will be heard after this commit
	}
}

// NotifyBell rings a relay in another process by NOTIFY. It does so outside of business transactions, on a connection of its own:
// a NOTIFY inside a transaction takes a lock over the whole cluster at commit and costs writers half of their throughput.
type NotifyBell struct {
	local LocalBell
	url   string
}

// NewNotifyBell makes a bell for the database at url. It rings only while Run runs.
func NewNotifyBell(url string) *NotifyBell {
	return &NotifyBell{local: NewLocalBell(), url: url}
}

// Ring asks for a notification.
func (b *NotifyBell) Ring() { b.local.Ring() }

// notifyInterval is the least time between two notifications of one process. Commits within it share one, and 2 ms are little
// beside the two commits and the confirm that follow.
const notifyInterval = 2 * time.Millisecond

// A NOTIFY is a transaction that writes to the log, and its commit waits for the disk although nothing of it need survive a crash. Without that
// wait the relay hears a commit's worth sooner, and the writers have the disk to themselves. It is a parameter of the transaction only, because a
// pooler in transaction mode has no session to set it in.
const notifySQL = `SELECT set_config('synchronous_commit', 'off', true), pg_notify('` + channel + `', '')`

// Run passes rings on until ctx is done. Failures only cost latency, since the relay polls as well: they are logged and tried again.
func (b *NotifyBell) Run(ctx context.Context) {
	postgres.KeepConnected(ctx, b.url, "doorbell", func(conn *pgx.Conn) error {
		for {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-b.local:
			}
			if _, err := conn.Exec(ctx, notifySQL); err != nil {
				b.Ring() // for the next connection
				return err
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(notifyInterval):
			}
		}
	})
}

// leaseNews is the payload of a notification that a shard has become free.
const leaseNews = "lease"

// TryDoorbell rings at one URL as writers do, and returns after what time it was heard at the other, where relays listen.
func TryDoorbell(ctx context.Context, ringURL, listenURL string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	var took time.Duration
	err := postgres.WithConnection(ctx, listenURL, func(ears *pgx.Conn) error {
		if _, err := ears.Exec(ctx, "LISTEN "+channel); err != nil {
			return err
		}
		return postgres.WithConnection(ctx, ringURL, func(hand *pgx.Conn) error {
			began := time.Now()
			if _, err := hand.Exec(ctx, notifySQL); err != nil {
				return err
			}
			_, err := ears.WaitForNotification(ctx)
			took = time.Since(began)
			return err
		})
	})
	if err != nil {
		return 0, fmt.Errorf("the doorbell is not heard: %w", err)
	}
	return took, nil
}
