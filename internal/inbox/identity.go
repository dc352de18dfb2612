package inbox

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/messaging"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

const (
	// slotLength and slots are the ring of the inbox table; migrations/0002_inbox.sql has as many partitions.
	slotLength = 24 * time.Hour
	slots      = 8
	// foreignSlot holds messages whose IDs carry no time.
	foreignSlot = -1
)

// identity is what a message is known by in the inbox.
type identity struct {
	slot int16
	id   uuid.UUID
}

// born is when the message's ID was made, unless the slot is foreign.
func (i identity) born() time.Time { return time.Unix(i.id.Time().UnixTime()).UTC() }

// foreignIDs is the name space in which the IDs of other senders, which may be any text, become UUIDs (version 8, by SHA-256).
var foreignIDs = uuid.MustParse("5d0f6b5e-7a53-4a8e-9d0b-6f3a1c2e8b47")

var errNoID = errors.New("the delivery has no message_id, so its copies cannot be told from new messages")

// wellFormed refuses what cannot be read, and what Postgres cannot store before it can fail a whole batch.
func wellFormed(d messaging.Delivery) error {
	if d.Flaw != "" {
		return &rejection{deadletter.Malformed, errors.New(d.Flaw)}
	}
	texts := []string{d.ID, d.Type, d.Key}
	for name, value := range d.Headers {
		texts = append(texts, name, value)
	}
	if !messaging.ValidText(strings.Join(texts, " ")) {
		return &rejection{deadletter.Malformed, errors.New("message_id, type, key and headers must be UTF-8 without NUL")}
	}
	if len(d.Key) > messaging.MaxKey {
		return &rejection{deadletter.Malformed, fmt.Errorf("the key has %d bytes, limit %d", len(d.Key), messaging.MaxKey)}
	}
	return nil
}

// identify finds out what a message is known by. It refuses an ID that is so far ahead of this process's clock that it
// would keep its slot from being emptied in time. That is a coarse sieve, twice as wide as the skew, because this clock
// may be wrong; judge is exact.
func (r ring) identify(id string, now time.Time) (identity, error) {
	if id == "" {
		return identity{}, &rejection{deadletter.NoID, errNoID}
	}
	who := identityOf(id, r.slot)
	if who.slot == foreignSlot {
		return who, nil
	}
	if now.Sub(who.born()) < -2*r.skew() {
		return identity{}, r.outside(who)
	}
	return who, nil
}

// judge refuses a message outside of the window, by the database's clock at the time when it was taken. What is older
// may have been applied and forgotten: it is not guessed at. What is too far ahead would keep its slot from being
// emptied in time.
func (r ring) judge(who identity, now time.Time) error {
	if who.slot == foreignSlot {
		return nil
	}
	if age := now.Sub(who.born()); age > r.window() || age < -r.skew() {
		return r.outside(who)
	}
	return nil
}

func (r ring) outside(who identity) error {
	return &rejection{deadletter.OutsideWindow, fmt.Errorf(
		"the message ID was made at %s; the inbox can only tell copies of messages between %s old and %s ahead", who.born(), r.window(), r.skew())}
}

// refuse makes a dead letter of a message that was taken and must not be applied. No attempt was made.
func (b *Inbox) refuse(ctx context.Context, tx pgx.Tx, one *item, done *outcome) error {
	letter := b.letter(ctx, one.Delivery, 0, &failure{one.outside})
	done.dead = append(done.dead, letter)
	return b.bury(ctx, tx, letter)
}

// identityOf finds the slot of a message ID. A UUIDv7 carries its time of birth, so all copies of a message come to the same slot, where
// the primary key tells that they are one.
func identityOf(id string, slot time.Duration) identity {
	parsed, err := uuid.Parse(id)
	if err != nil || parsed.Version() != 7 || parsed.Variant() != uuid.RFC4122 {
		return identity{foreignSlot, uuid.NewHash(sha256.New(), foreignIDs, []byte(id), 8)}
	}
	born := time.Unix(parsed.Time().UnixTime())
	return identity{int16(born.UnixMilli() / slot.Milliseconds() % slots), parsed}
}
