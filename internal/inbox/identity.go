package inbox

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"time"

	"example.com/orders/internal/deadletter"
	"example.com/orders/internal/messaging"
	"github.com/google/uuid"
)

const (
	// slotLength and slots are the ring of the inbox table; migrations/0002_inbox.sql has as many partitions.
	slotLength = 24 * time.Hour
	slots      = 8
	// foreignSlot holds messages whose IDs carry no time.
	foreignSlot = -1
	// window is how old a message may be. One slot less than the ring, since the oldest slot is emptied for the next.
	window = (slots - 1) * slotLength
	// maxSkew is how far in the future the time in an ID may lie: the sender's clock against ours.
	maxSkew = 10 * time.Minute
)

// identity is what a message is known by in the inbox.
type identity struct {
	slot int16
	id   uuid.UUID
}

// foreignIDs is the name space in which the IDs of other senders, which may be any text, become UUIDs (version 8, by SHA-256).
var foreignIDs = uuid.MustParse("5d0f6b5e-7a53-4a8e-9d0b-6f3a1c2e8b47")

var errNoID = errors.New("the delivery has no message_id, so its copies cannot be told from new messages")

// wellFormed refuses what Postgres cannot store, before it can fail a whole batch.
func wellFormed(d messaging.Delivery) error {
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

// identify finds the slot of a message ID. A UUIDv7 carries its time of birth, so all copies of a message come to the same slot, where
// the primary key tells that they are one. What is older than the window may have been applied and forgotten: it is refused, not
// guessed at. So is what claims to come from the future, since its slot will be emptied before its time.
func identify(id string, now time.Time) (identity, error) {
	if id == "" {
		return identity{}, &rejection{deadletter.NoID, errNoID}
	}
	parsed, err := uuid.Parse(id)
	if err != nil || parsed.Version() != 7 || parsed.Variant() != uuid.RFC4122 {
		return identity{foreignSlot, uuid.NewHash(sha256.New(), foreignIDs, []byte(id), 8)}, nil
	}
	born := time.Unix(parsed.Time().UnixTime()).UTC()
	if age := now.Sub(born); age > window || age < -maxSkew {
		return identity{}, &rejection{deadletter.OutsideWindow, fmt.Errorf(
			"the message ID was made at %s; the inbox can only tell copies of messages between %s old and %s ahead", born, window, maxSkew)}
	}
	return identity{int16(born.Unix() / int64(slotLength.Seconds()) % slots), parsed}, nil
}
