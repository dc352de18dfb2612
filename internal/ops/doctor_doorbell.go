package ops

import (
	"context"
	"errors"
	"fmt"
	"time"

	"example.com/shop/internal/outbox"
	"example.com/shop/internal/session"
	"github.com/jackc/pgx/v5"
)

// errNoRing means that the doorbell was rung at one URL and did not arrive at the other.
var errNoRing = errors.New("the doorbell did not arrive")

// ringTimeout is how long tryDoorbell waits for the ring.
const ringTimeout = 3 * time.Second

// tryDoorbell rings at one URL as writers do, and returns how long the ring took to arrive at the other, where relays
// listen. It returns errNoRing if both can be reached and the ring does not arrive.
func tryDoorbell(ctx context.Context, ringURL, listenURL string) (time.Duration, error) {
	var took time.Duration
	err := session.With(ctx, listenURL, func(listener *pgx.Conn) error {
		if _, err := listener.Exec(ctx, "LISTEN "+outbox.Channel); err != nil {
			return err
		}
		return session.With(ctx, ringURL, func(writer *pgx.Conn) error {
			began := time.Now()
			if _, err := writer.Exec(ctx, "NOTIFY "+outbox.Channel); err != nil {
				return err
			}
			limited, cancel := context.WithTimeout(ctx, ringTimeout)
			defer cancel()
			_, err := listener.WaitForNotification(limited)
			took = time.Since(began)
			if err != nil && limited.Err() != nil && ctx.Err() == nil {
				return fmt.Errorf("%w within %s", errNoRing, ringTimeout)
			}
			return err
		})
	})
	if err != nil {
		return 0, fmt.Errorf("try doorbell: %w", err)
	}
	return took, nil
}
