// Package idempotency answers repeated calls with a stored response.
//
// # What it guarantees
//
// A method opts in with one line in its proto file: option (idempotency.v1.key) = true. A call with the header
// Idempotency-Key is then executed once for its caller and key. One transaction commits the key, the response, and
// everything that the handler wrote through postgres.Transact or outbox.Writer.Transact. A repeat with the same request
// gets the stored response. A repeat with another request or of another method fails with already_exists. Repeats while
// the first call runs wait for its end.
//
// A repeat is answered even if the backlog gate (outbox.Gate) is closed, because it writes nothing.
//
// A call that fails leaves nothing, not even its key, so a repeat is executed again. To learn an unknown outcome, the
// caller repeats the call.
//
// The package guarantees nothing about effects outside of this database, or about response headers, which are not
// stored. After the retention a key counts as new. A mutating unary method that has not opted in refuses calls with
// the header, because the caller relies on it. Reads and streams ignore it.
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
	// Caller returns the name of the caller. Callers do not share keys. By default, all calls have the same caller.
	Caller func(ctx context.Context) string
	// Retention is how long a key is stored. Default 24 h: longer than anybody repeats a call.
	Retention time.Duration
}

// Keys stores idempotency keys and the responses to their calls.
type Keys struct {
	db     *pgxpool.Pool
	out    *outbox.Writer
	config Config
	// turns admits one call of a key at a time.
	turns *turns[account]
	// room bounds the calls that use a connection. They get two fifths of the pool: their handlers may need a second
	// connection to read, other parts may use half of the pool in the same way, and some connections must be left.
	room *semaphore.Weighted
	// shares limits each caller to all places of the room but one, so that the slow calls of one caller do not block
	// others.
	shares *turns[string]
}

// New makes Keys on db, which must be the pool that the handlers write to, directly or through out.
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

// Headers returns the headers that Interceptor reads from requests and writes to responses.
func Headers() (request, response []string) { return []string{keyHeader}, []string{replayedHeader} }

// Interceptor returns the interceptor that handles keys. It must follow the interceptors that identify the caller and
// validate requests, and any that handles the keys of some calls itself.
func (k *Keys) Interceptor() connect.ServerInterceptor {
	return func(next connect.ServerFunc) connect.ServerFunc {
		return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
			info, ok := connect.CallInfoForServerContext(ctx)
			reads := spec.StreamType != connect.StreamTypeUnary ||
				spec.IdempotencyLevel == connect.IdempotencyNoSideEffects
			if !ok || reads || !info.RequestHeader().Has(keyHeader) {
				return next(ctx, spec, stream)
			}
			key := info.RequestHeader().Get(keyHeader)
			if key == "" || len(key) > maxKey || !messaging.ValidText(key) {
				return connect.Errorf(connect.CodeInvalidArgument,
					"idempotency key must be UTF-8 without NUL, of 1 to %d bytes", maxKey)
			}
			method, options := unary.Describe(spec)
			if optedIn, _ := proto.GetExtension(options, idempotencyv1.E_Key).(bool); !optedIn {
				return connect.Errorf(connect.CodeFailedPrecondition,
					"%s does not support Idempotency-Key: its proto file must set option (idempotency.v1.key) = true",
					spec.Procedure)
			}
			request, err := unary.Receive(method, stream)
			if err != nil {
				return err
			}
			c := call{account: account{k.config.Caller(ctx), key}, method: method, spec: spec, request: request}
			response, replayed, err := k.once(ctx, c, next)
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

// account is a key and its caller.
type account struct{ caller, key string }

// call is one call with a key.
type call struct {
	account
	method  protoreflect.MethodDescriptor
	spec    connect.Spec
	request proto.Message
}

// once executes a call, or returns the response that is stored for it.
func (k *Keys) once(
	ctx context.Context, c call, next connect.ServerFunc,
) (response proto.Message, replayed bool, err error) {
	hash, err := unary.Hash(c.request)
	if err != nil {
		return nil, false, err
	}
	// Repeats in this process wait here, without a connection. Repeats in other processes wait in the database.
	leave, err := k.turns.wait(ctx, c.account)
	if err != nil {
		return nil, false, err
	}
	defer leave()
	leaveShare, err := k.shares.wait(ctx, c.caller)
	if err != nil {
		return nil, false, err
	}
	defer leaveShare()
	if err := k.room.Acquire(ctx, 1); err != nil {
		return nil, false, err
	}
	defer k.room.Release(1)
	// A repeat writes nothing, so it is answered even if the backlog is full.
	repeat := func(tx pgx.Tx) (bool, error) {
		response, replayed, err = find(ctx, tx, c, hash)
		return replayed, err
	}
	err = k.out.TransactOnce(ctx, repeat, func(tx pgx.Tx) error {
		taken, err := take(ctx, tx, c, hash)
		if err != nil {
			return err
		}
		if replayed = !taken; replayed {
			var found bool
			if response, found, err = find(ctx, tx, c, hash); err == nil && !found { // swept between the two statements
				err = connect.NewError(connect.CodeAborted,
					"the idempotency key has just expired; nothing was done, try again")
			}
			return err
		}
		stream := &unary.Stream{Request: c.request}
		if err := next(postgres.Join(ctx, k.db, tx), c.spec, stream); err != nil {
			return err
		}
		response = stream.Response
		return store(ctx, tx, c, response)
	})
	return response, replayed, err
}

// The first of several calls with one key inserts the row. The others wait here until its transaction ends. If it has
// committed, they insert nothing.
const takeSQL = `
INSERT INTO idempotency_key (caller, key, method, request_hash) VALUES ($1, $2, $3, $4)
ON CONFLICT (caller, key) DO NOTHING`

// take reports whether the key is new. If so, it locks the key until the transaction ends.
func take(ctx context.Context, tx pgx.Tx, c call, hash []byte) (taken bool, err error) {
	tag, err := tx.Exec(ctx, takeSQL, c.caller, c.key, c.spec.Procedure, hash)
	if err != nil {
		return false, fmt.Errorf("take idempotency key: %w", err)
	}
	return tag.RowsAffected() == 1, nil
}

const findSQL = `SELECT method, request_hash, response FROM idempotency_key WHERE caller = $1 AND key = $2`

// find returns the stored response to a call, if there is one. It returns an error if the key belongs to another call.
func find(ctx context.Context, tx pgx.Tx, c call, hash []byte) (response proto.Message, found bool, err error) {
	var method string
	var storedHash, stored []byte
	err = tx.QueryRow(ctx, findSQL, c.caller, c.key).Scan(&method, &storedHash, &stored)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, false, nil
	case err != nil:
		return nil, false, fmt.Errorf("read idempotency key: %w", err)
	case method != c.spec.Procedure || !bytes.Equal(storedHash, hash):
		return nil, false, connect.NewError(connect.CodeAlreadyExists,
			"the idempotency key was used for another request")
	}
	response = unary.New(c.method.Output())
	if err := proto.Unmarshal(stored, response); err != nil {
		return nil, false, fmt.Errorf("decode stored response: %w", err)
	}
	return response, true, nil
}

// store stores the response in the row of the key.
func store(ctx context.Context, tx pgx.Tx, c call, response proto.Message) error {
	if response == nil {
		return errors.New("handler has sent no response")
	}
	text, err := proto.Marshal(response)
	if err != nil {
		return fmt.Errorf("encode response: %w", err)
	}
	_, err = tx.Exec(ctx, `UPDATE idempotency_key SET response = $3 WHERE caller = $1 AND key = $2`,
		c.caller, c.key, messaging.NotNil(text))
	if err != nil {
		return fmt.Errorf("store response: %w", err)
	}
	return nil
}

// sweepInterval is the time between two sweeps of one process.
const sweepInterval = 10 * time.Minute

// Run deletes keys after their retention, until ctx is done. Any number of processes may run it.
func (k *Keys) Run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := k.sweep(ctx); err != nil && ctx.Err() == nil {
			slog.WarnContext(ctx, "idempotency keys not swept; the table grows until they are", "error", err)
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
