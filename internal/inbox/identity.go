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
	// slotLength and slots describe the ring of the table inbox. migrations/core/0002_inbox.sql creates one partition
	// per slot.
	slotLength = 24 * time.Hour
	slots      = 8
	// foreignSlot is for messages whose IDs contain no time.
	foreignSlot = -1
)

// identity identifies a message in the inbox.
type identity struct {
	slot int16
	id   uuid.UUID
}

// createdAt returns the time in the message's ID. A foreign ID contains none.
func (i identity) createdAt() time.Time { return time.Unix(i.id.Time().UnixTime()).UTC() }

// foreignIDs is the namespace in which the IDs of other senders, which may be any text, become UUIDs (version 8,
// SHA-256).
var foreignIDs = uuid.MustParse("5d0f6b5e-7a53-4a8e-9d0b-6f3a1c2e8b47")

var errNoID = errors.New("the delivery has no message_id, so its copies cannot be told from new messages")

// wellFormed refuses deliveries that cannot be read or that Postgres cannot store, before one of them fails a whole
// batch.
func wellFormed(d messaging.Delivery) error {
	if d.Flaw != "" {
		return &rejection{deadletter.Malformed, errors.New(d.Flaw)}
	}
	texts := []string{d.ID, d.Type, d.Key}
	for name, value := range d.Headers {
		texts = append(texts, name, value)
	}
	if !messaging.ValidText(strings.Join(texts, " ")) {
		return &rejection{deadletter.Malformed,
			errors.New("message_id, type, key and headers must be UTF-8 without NUL")}
	}
	if len(d.Key) > messaging.MaxKey {
		return &rejection{deadletter.Malformed, fmt.Errorf("the key has %d bytes, limit %d", len(d.Key),
			messaging.MaxKey)}
	}
	return nil
}

// identify returns the identity of a message. It refuses an ID so far ahead of this process's clock that it would keep
// its slot from being truncated in time. The limit is coarse, twice the skew, because this clock may be wrong; judge is
// exact.
func (r ring) identify(id string, now time.Time) (identity, error) {
	if id == "" {
		return identity{}, &rejection{deadletter.NoID, errNoID}
	}
	found := identityOf(id, r.slot)
	if found.slot == foreignSlot {
		return found, nil
	}
	if now.Sub(found.createdAt()) < -2*r.skew() {
		return identity{}, r.outside(found)
	}
	return found, nil
}

// judge refuses a message outside the window, by the database's clock when the message was taken. An older message may
// have been applied and forgotten, so the inbox does not guess. A message too far ahead would keep its slot from being
// truncated in time.
func (r ring) judge(id identity, now time.Time) error {
	if id.slot == foreignSlot {
		return nil
	}
	if age := now.Sub(id.createdAt()); age > r.window() || age < -r.skew() {
		return r.outside(id)
	}
	return nil
}

func (r ring) outside(id identity) error {
	return &rejection{deadletter.OutsideWindow, fmt.Errorf(
		"the message ID was made at %s; the inbox recognizes copies only of messages between %s old and %s ahead",
		id.createdAt(), r.window(), r.skew())}
}

// refuse makes a dead letter of a message that was taken but must not be applied. It counts no attempt.
func (b *Inbox) refuse(ctx context.Context, tx pgx.Tx, it *item, done *outcome) error {
	letter := b.deadLetter(ctx, it.Delivery, 0, &failure{it.outside})
	done.dead = append(done.dead, letter)
	return b.storeDead(ctx, tx, letter)
}

// identityOf returns the identity of a message by its ID. A UUIDv7 contains the time of its creation, so all copies of
// a message get the same slot, where the primary key recognizes them.
func identityOf(id string, slot time.Duration) identity {
	parsed, err := uuid.Parse(id)
	if err != nil || parsed.Version() != 7 || parsed.Variant() != uuid.RFC4122 {
		return identity{foreignSlot, uuid.NewHash(sha256.New(), foreignIDs, []byte(id), 8)}
	}
	created := time.Unix(parsed.Time().UnixTime())
	return identity{int16(created.UnixMilli() / slot.Milliseconds() % slots), parsed}
}
