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
	// slotLength and slots define the ring of the inbox table. migrations/0002_inbox.sql has one partition for each slot.
	slotLength = 24 * time.Hour
	slots      = 8
	// foreignSlot is the slot of messages whose IDs contain no time.
	foreignSlot = -1
)

// identity identifies a message in the inbox.
type identity struct {
	slot int16
	id   uuid.UUID
}

// created returns the time in the message's ID. It means nothing in the foreign slot.
func (i identity) created() time.Time { return time.Unix(i.id.Time().UnixTime()).UTC() }

// foreignIDs is the namespace for the IDs of foreign publishers, which may be any text. They are hashed by SHA-256 to
// UUIDs of version 8.
var foreignIDs = uuid.MustParse("5d0f6b5e-7a53-4a8e-9d0b-6f3a1c2e8b47")

var errNoID = errors.New("the delivery has no message_id, so its copies cannot be distinguished from new messages")

// wellFormed refuses deliveries that cannot be read or stored. Without it, one of them would fail a whole batch.
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

// identify returns the identity of a message ID. It refuses an ID so far ahead of this process's clock that its slot
// could not be emptied in time. The check allows twice the skew because this clock may be wrong. judge is exact.
func (r ring) identify(id string, now time.Time) (identity, error) {
	if id == "" {
		return identity{}, &rejection{deadletter.NoID, errNoID}
	}
	found := identityOf(id, r.slot)
	if found.slot == foreignSlot {
		return found, nil
	}
	if now.Sub(found.created()) < -2*r.skew() {
		return identity{}, r.outside(found)
	}
	return found, nil
}

// judge refuses a message outside the window, by the database's clock at the time when it was taken. An older message
// may have been applied and forgotten. A message too far ahead would keep its slot from being emptied in time.
func (r ring) judge(id identity, now time.Time) error {
	if id.slot == foreignSlot {
		return nil
	}
	if age := now.Sub(id.created()); age > r.window() || age < -r.skew() {
		return r.outside(id)
	}
	return nil
}

func (r ring) outside(id identity) error {
	return &rejection{deadletter.OutsideWindow, fmt.Errorf(
		"the message ID was created at %s; the inbox recognizes copies only if their IDs are at most %s old and %s ahead",
		id.created(), r.window(), r.skew())}
}

// refuse makes a taken message that must not be applied a dead letter, without an attempt.
func (b *Inbox) refuse(ctx context.Context, tx pgx.Tx, message *item, done *outcome) error {
	letter := b.letter(ctx, message.Delivery, 0, &failure{message.outside})
	done.dead = append(done.dead, letter)
	return b.bury(ctx, tx, letter)
}

// identityOf returns the identity of a message ID. A UUIDv7 contains its creation time, so all copies of a message
// belong to one slot, where the primary key recognizes them.
func identityOf(id string, slot time.Duration) identity {
	parsed, err := uuid.Parse(id)
	if err != nil || parsed.Version() != 7 || parsed.Variant() != uuid.RFC4122 {
		return identity{foreignSlot, uuid.NewHash(sha256.New(), foreignIDs, []byte(id), 8)}
	}
	created := time.Unix(parsed.Time().UnixTime())
	return identity{int16(created.UnixMilli() / slot.Milliseconds() % slots), parsed}
}
