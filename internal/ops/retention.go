package ops

import (
	"context"
	"errors"
	"fmt"
	"time"

	"example.com/shop/internal/inbox"
	"github.com/jackc/pgx/v5/pgxpool"
)

// ErrForgetful means that the inbox forgets a message while copies of it may still come. Such a copy would not be
// applied a second time, since the inbox takes nothing older than it remembers; it would be a dead letter, and so would
// be every replay.
var ErrForgetful = errors.New("the inbox forgets too early")

// CheckRetention holds what the inbox remembers against the oldest copy that may come: of a message that the outbox has
// kept to the end of its retention, replayed then, and under way for as long as redelivery takes. It returns
// ErrForgetful, with the numbers, if that is too old. What is spare is the time for which consumers may be away.
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

// days is a duration for people, to the minute.
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
