// Package idempotency answers a repeated call with the stored response.
//
// # What it guarantees
//
// A method opts in with one line of its proto file, option (idempotency.v1.key) = true. A call of it with the header Idempotency-Key is then executed
// once for its caller and key: key, response and what the handler wrote through postgres.Transact or outbox.Writer.Transact are committed in one
// transaction, or none of them. A repeat with the same request gets the stored response; one with another request, or of another method,
// is already_exists; repeats while the first one runs wait for its end.
//
// A repeat is answered although the backlog gate is closed (outbox.Gate), because it writes nothing.
//
// A call that fails leaves nothing, its key included: a repeat is executed anew. An unknown outcome becomes known by repeating the call.
//
// It does not promise anything about effects outside of this database, nor about headers of the response, which are not stored. After the retention
// a key is like new. A mutating unary method that has not opted in refuses calls with the header, for their caller relies on it; reads and streams do
// not look at it.
package idempotency

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"connectrpc.com/connect/v2"
	idempotencyv1 "example.com/shop/internal/gen/idempotency/v1"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/unary"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/semaphore"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Config sets up Keys.
type Config struct {
	// Caller names who calls: keys of different callers are different. Default: all calls are the same caller's.
	Caller func(ctx context.Context) string
	// Retention is how long a key is remembered. Default 24 h: longer than anybody repeats a call.
	Retention time.Duration
}

// Keys remembers keys and the responses to their calls.
type Keys struct {
	db     *pgxpool.Pool
	out    *outbox.Writer
	config Config
	// turns are those of one key.
	turns *turns[account]
	// room is for the calls that hold a connection. Their handlers may need another one to read, so they get two fifths of the pool: half of it
	// may be held by durable calls, for which the same is true, and something must be left.
	room *semaphore.Weighted
	// shares are what each caller may have of the room: all but one place, so that no caller's slow calls hold up those of others.
	shares *turns[string]
}

// New makes Keys on db, which must be the pool that the handlers write to, through out or by themselves.
func New(db *pgxpool.Pool, out *outbox.Writer, config Config) *Keys {
	config.Retention = cmp.Or(config.Retention, 24*time.Hour)
	if config.Caller == nil {
		config.Caller = func(context.Context) string { return "" }
	}
	room := max(1, int(db.Config().MaxConns)*2/5)
	return &Keys{
		db: db, out: out, config: config, turns: newTurns[account](1),
		room: semaphore.NewWeighted(int64(room)), shares: newTurns[string](max(1, room-1)),
	}
}

const (
	keyHeader = "Idempotency-Key"
	// replayedHeader marks a response that was stored before.
	replayedHeader = "Idempotency-Replayed"
	// maxKey is the longest key in bytes.
	maxKey = 255
)

// Headers returns the headers that Interceptor reads of requests and writes to answers.
func Headers() (request, response []string) { return []string{keyHeader}, []string{replayedHeader} }

// Interceptor returns the interceptor that honours keys. It must stand within those that know the caller and that check requests, and before it
// one that makes durable calls, which have keys of their own.
func (k *Keys) Interceptor() connect.ServerInterceptor {
	return func(next connect.ServerFunc) connect.ServerFunc {
		return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
			info, ok := connect.CallInfoForServerContext(ctx)
			reads := spec.StreamType != connect.StreamTypeUnary || spec.IdempotencyLevel == connect.IdempotencyNoSideEffects
			if !ok || reads || !info.RequestHeader().Has(keyHeader) {
				return next(ctx, spec, stream)
			}
			key := info.RequestHeader().Get(keyHeader)
			if key == "" || len(key) > maxKey || !messaging.ValidText(key) {
				return connect.Errorf(connect.CodeInvalidArgument, "an idempotency key is UTF-8 without NUL, of 1 to %d bytes", maxKey)
			}
			method, options := unary.Describe(spec)
			if optedIn, _ := proto.GetExtension(options, idempotencyv1.E_Key).(bool); !optedIn {
				return connect.Errorf(connect.CodeFailedPrecondition,
					"%s does not honour Idempotency-Key: its proto file must declare it with option (idempotency.v1.key) = true", spec.Procedure)
			}
			request, err := unary.Receive(method, stream)
			if err != nil {
				return err
			}
			one := call{account: account{k.config.Caller(ctx), key}, method: method, spec: spec, request: request}
			response, replayed, err := k.once(ctx, one, next)
			if err != nil {
				return err
			}
			if replayed {
				info.ResponseHeader().Set(replayedHeader, "true")
			}
			return stream.Send(response)
		}
	}
}

// account is whose key it is.
type account struct{ caller, key string }

// call is one call with a key.
type call struct {
	account
	method  protoreflect.MethodDescriptor
	spec    connect.Spec
	request proto.Message
}

// once executes a call, or returns the response that is stored for it.
func (k *Keys) once(ctx context.Context, one call, next connect.ServerFunc) (response proto.Message, replayed bool, err error) {
	hash, err := unary.Hash(one.request)
	if err != nil {
		return nil, false, err
	}
	// Repeats in this process wait here, without a connection; those in others wait in the database.
	leave, err := k.turns.wait(ctx, one.account)
	if err != nil {
		return nil, false, err
	}
	defer leave()
	leaveShare, err := k.shares.wait(ctx, one.caller)
	if err != nil {
		return nil, false, err
	}
	defer leaveShare()
	if err := k.room.Acquire(ctx, 1); err != nil {
		return nil, false, err
	}
	defer k.room.Release(1)
	// A repeat writes nothing, so a full backlog is no reason to refuse it.
	repeat := func(tx pgx.Tx) (bool, error) {
		response, replayed, err = find(ctx, tx, one, hash)
		return replayed, err
	}
	err = k.out.TransactOnce(ctx, repeat, func(tx pgx.Tx) error {
		taken, err := take(ctx, tx, one, hash)
		if err != nil {
			return err
		}
		if replayed = !taken; replayed {
			var found bool
			if response, found, err = find(ctx, tx, one, hash); err == nil && !found { // forgotten this very moment
				err = connect.NewError(connect.CodeAborted, "the idempotency key has just expired; nothing was done, try again")
			}
			return err
		}
		stream := &unary.Stream{Request: one.request}
		if err := next(postgres.Join(ctx, k.db, tx), one.spec, stream); err != nil {
			return err
		}
		response = stream.Response
		return keep(ctx, tx, one, response)
	})
	return response, replayed, err
}

// Of several calls with one key the first inserts; the others wait for its end here, and then get no row if it was committed.
const takeSQL = `
INSERT INTO idempotency_key (caller, key, method, request_hash) VALUES ($1, $2, $3, $4)
ON CONFLICT (caller, key) DO NOTHING`

// take tells whether the key is new, and keeps others from it until the transaction ends.
func take(ctx context.Context, tx pgx.Tx, one call, hash []byte) (taken bool, err error) {
	tag, err := tx.Exec(ctx, takeSQL, one.caller, one.key, one.spec.Procedure, hash)
	if err != nil {
		return false, fmt.Errorf("take idempotency key: %w", err)
	}
	return tag.RowsAffected() == 1, nil
}

const findSQL = `SELECT method, request_hash, response FROM idempotency_key WHERE caller = $1 AND key = $2`

// find returns the stored response to a call, if there is one. It is an error if the key stands for another call.
func find(ctx context.Context, tx pgx.Tx, one call, hash []byte) (response proto.Message, found bool, err error) {
	var method string
	var storedHash, stored []byte
	err = tx.QueryRow(ctx, findSQL, one.caller, one.key).Scan(&method, &storedHash, &stored)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, false, nil
	case err != nil:
		return nil, false, fmt.Errorf("read idempotency key: %w", err)
	case method != one.spec.Procedure || !bytes.Equal(storedHash, hash):
		return nil, false, connect.NewError(connect.CodeAlreadyExists, "the idempotency key was used for another request")
	}
	response = unary.New(one.method.Output())
	if err := proto.Unmarshal(stored, response); err != nil {
		return nil, false, fmt.Errorf("decode stored response: %w", err)
	}
	return response, true, nil
}

// keep stores the response.
func keep(ctx context.Context, tx pgx.Tx, one call, response proto.Message) error {
	if response == nil {
		return errors.New("the handler has sent no response")
	}
	text, err := proto.Marshal(response)
	if err != nil {
		return fmt.Errorf("encode response: %w", err)
	}
	_, err = tx.Exec(ctx, `UPDATE idempotency_key SET response = $3 WHERE caller = $1 AND key = $2`, one.caller, one.key, messaging.NotNil(text))
	if err != nil {
		return fmt.Errorf("store response: %w", err)
	}
	return nil
}

// sweepInterval is the time between two sweeps of one process.
const sweepInterval = 10 * time.Minute

// Run forgets keys that are past their retention, until ctx is done. Any number of processes may do so.
func (k *Keys) Run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := k.sweep(ctx); err != nil && ctx.Err() == nil {
			slog.WarnContext(ctx, "idempotency keys not swept, they grow until they are", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(sweepInterval + rand.N(time.Minute)):
		}
	}
}

func (k *Keys) sweep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var forgotten int
	err := postgres.Transact(ctx, k.db, func(tx pgx.Tx) error { // for its isolation level
		return tx.QueryRow(ctx, `SELECT idempotency_key_sweep($1)`, k.config.Retention).Scan(&forgotten)
	})
	if err != nil {
		return fmt.Errorf("sweep idempotency keys: %w", err)
	}
	if forgotten > 0 {
		slog.InfoContext(ctx, "idempotency keys swept", "forgotten", forgotten)
	}
	return nil
}
