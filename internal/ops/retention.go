package ops

import (
	"context"
	"errors"
	"fmt"
	"time"

	"example.com/shop/internal/inbox"
	"github.com/jackc/pgx/v5/pgxpool"
)

// ErrForgetful means that the inbox forgets a message while copies of it may still arrive. Such a copy would not be
// applied a second time, because the inbox accepts nothing older than it remembers. It would become a dead letter, and
// so would every replayed message.
var ErrForgetful = errors.New("the inbox forgets too early")

// CheckRetention compares what the inbox remembers with the oldest copy that may arrive: of a message that the outbox
// kept to the end of its retention, that was replayed then, and that took the longest redelivery. It returns
// ErrForgetful, with the numbers, if that copy is too old. The difference is how long consumers may be away.
func CheckRetention(ctx context.Context, db *pgxpool.Pool, longestRedelivery time.Duration) (detail string, err error) {
	kept, err := longestRetention(ctx, db)
	if err != nil {
		return "", err
	}
	spare := inbox.Retention - kept - longestRedelivery
	detail = fmt.Sprintf("the outbox keeps messages for at most %s, redelivery takes at most %s, the inbox remembers %s",
		days(kept), days(longestRedelivery), days(inbox.Retention))
	if spare <= 0 {
		return "", fmt.Errorf("%w: %s", ErrForgetful, detail)
	}
	return detail + "; consumers may be away for " + days(spare), nil
}

// days formats a duration in days, hours and minutes.
func days(d time.Duration) string {
	minutes := int(d.Round(time.Minute).Minutes())
	text := ""
	for _, unit := range []struct {
		name    string
		minutes int
	}{{"d", 24 * 60}, {"h", 60}, {"m", 1}} {
		if n := minutes / unit.minutes; n > 0 {
			text, minutes = fmt.Sprintf("%s%d%s", text, n, unit.name), minutes%unit.minutes
		}
	}
	if text == "" {
		return "0m"
	}
	return text
}
