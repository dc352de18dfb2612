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

// errNotHeard means that the doorbell was rung at one URL and not heard at the other.
var errNotHeard = errors.New("the doorbell is not heard")

// bellPatience is how long tryDoorbell waits for the ring.
const bellPatience = 3 * time.Second

// tryDoorbell rings at one URL as writers do, and returns after what time it was heard at the other, where relays
// listen. It returns errNotHeard if both can be reached and the ring does not come.
func tryDoorbell(ctx context.Context, ringURL, listenURL string) (time.Duration, error) {
	var took time.Duration
	err := session.With(ctx, listenURL, func(ears *pgx.Conn) error {
		if _, err := ears.Exec(ctx, "LISTEN "+outbox.Channel); err != nil {
			return err
		}
		return session.With(ctx, ringURL, func(hand *pgx.Conn) error {
			began := time.Now()
			if _, err := hand.Exec(ctx, "NOTIFY "+outbox.Channel); err != nil {
				return err
			}
			limited, cancel := context.WithTimeout(ctx, bellPatience)
			defer cancel()
			_, err := ears.WaitForNotification(limited)
			took = time.Since(began)
			if err != nil && limited.Err() != nil && ctx.Err() == nil {
				return fmt.Errorf("%w within %s", errNotHeard, bellPatience)
			}
			return err
		})
	})
	if err != nil {
		return 0, fmt.Errorf("try doorbell: %w", err)
	}
	return took, nil
}
