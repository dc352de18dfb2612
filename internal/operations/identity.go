package operations

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"github.com/google/uuid"
)

// Identity passes the identity of a caller from the submit to the execution. Set all of its fields or none.
type Identity struct {
	// Name returns the name of the caller, or "" if it has none. Callers do not share operations or keys.
	Name func(ctx context.Context) string
	// Capture returns the data from which Restore restores the caller. The data is stored, so it must not contain
	// credentials.
	Capture func(ctx context.Context) ([]byte, error)
	// Restore returns a context with the caller, for interceptors that authorize it and for handlers.
	Restore func(ctx context.Context, captured []byte) (context.Context, error)
}

// Caller returns Name of ctx, or "" if Name is nil.
func (i Identity) Caller(ctx context.Context) string {
	if i.Name == nil {
		return ""
	}
	return i.Name(ctx)
}

func (i Identity) capture(ctx context.Context) (caller string, captured []byte, err error) {
	if i.Capture == nil {
		return i.Caller(ctx), nil, nil
	}
	if captured, err = i.Capture(ctx); err != nil {
		return "", nil, fmt.Errorf("capture identity: %w", err)
	}
	return i.Caller(ctx), captured, nil
}

func (i Identity) restore(ctx context.Context, captured []byte) (context.Context, error) {
	if i.Restore == nil {
		return ctx, nil
	}
	ctx, err := i.Restore(ctx, captured)
	if err != nil {
		return nil, fmt.Errorf("restore identity: %w", err)
	}
	return ctx, nil
}

// minKey is the shortest key in bytes: the size of the hash.
const minKey = sha256.Size

// check panics on keys that can be guessed.
func (c Config) check() {
	for _, key := range c.Keys {
		if len(key) < minKey {
			panic(fmt.Sprintf("operations: a key has %d bytes, but must have at least %d", len(key), minKey))
		}
	}
}

// ticket is the signed part of an operation: its ID, its caller and the call.
type ticket struct {
	id       uuid.UUID
	caller   string
	method   string
	request  []byte
	identity []byte
}

// sign returns a signature by the first key, or nil if there are no keys.
func (c Config) sign(t ticket) []byte {
	if len(c.Keys) == 0 {
		return nil
	}
	return t.mac(c.Keys[0])
}

// verify reports whether one of the keys has signed t. Without keys it accepts everything.
func (c Config) verify(t ticket, signature []byte) bool {
	for _, key := range c.Keys {
		if hmac.Equal(signature, t.mac(key)) {
			return true
		}
	}
	return len(c.Keys) == 0
}

// mac covers every field together with its length, so that bytes cannot move from one field to another.
func (t ticket) mac(key []byte) []byte {
	mac := hmac.New(sha256.New, key)
	for _, field := range [][]byte{t.id[:], []byte(t.caller), []byte(t.method), t.request, t.identity} {
		_, _ = mac.Write(binary.BigEndian.AppendUint64(nil, uint64(len(field)))) // never fails
		_, _ = mac.Write(field)
	}
	return mac.Sum(nil)
}
