package operations

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"github.com/google/uuid"
)

// Identity is how the caller of a request gets to where it is executed. All of it or nothing must be given.
type Identity struct {
	// Name tells callers apart: nobody sees the operations of another, nor are their keys the same. It is "" for who has no name.
	Name func(ctx context.Context) string
	// Capture returns what Restore needs to know of the caller: no credentials, since it is stored.
	Capture func(ctx context.Context) ([]byte, error)
	// Restore returns a context in which the caller is known, to interceptors that decide what it may do and to handlers.
	Restore func(ctx context.Context, captured []byte) (context.Context, error)
}

// Caller is Name, for everybody the same if nobody is known.
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
			panic(fmt.Sprintf("operations: a key has %d bytes, and must have %d", len(key), minKey))
		}
	}
}

// ticket is what is signed of an operation: who calls what.
type ticket struct {
	id       uuid.UUID
	caller   string
	method   string
	request  []byte
	identity []byte
}

// sign returns the signature of the newest key, nil if there is none.
func (c Config) sign(t ticket) []byte {
	if len(c.Keys) == 0 {
		return nil
	}
	return t.mac(c.Keys[0])
}

// verify tells whether one of the keys has signed t.
func (c Config) verify(t ticket, signature []byte) bool {
	for _, key := range c.Keys {
		if hmac.Equal(signature, t.mac(key)) {
			return true
		}
	}
	return len(c.Keys) == 0
}

// mac covers every field with its length, so that none can be moved into another.
func (t ticket) mac(key []byte) []byte {
	mac := hmac.New(sha256.New, key)
	for _, field := range [][]byte{t.id[:], []byte(t.caller), []byte(t.method), t.request, t.identity} {
		_, _ = mac.Write(binary.BigEndian.AppendUint64(nil, uint64(len(field)))) // never fails
		_, _ = mac.Write(field)
	}
	return mac.Sum(nil)
}
