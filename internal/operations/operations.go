// Package operations carries durable calls: a unary call that is taken now, executed later, and whose result is kept.
//
// # What it guarantees
//
// A call that was taken is executed until it has a result: a response, an error of its handler, or an error that says that it was given up. The
// result survives the death of every process. It is committed together with what the handler wrote through postgres.Transact or
// outbox.Writer.Transact, and with the inbox row of the message that the call travels by: so each call has one result, and its effect in this
// database is made exactly once if the result is a response, and not at all if it is an error.
//
// What a handler does elsewhere may happen more than once, as may what it writes past those transactions. That is why only methods that are
// declared IDEMPOTENT can be called so.
//
// The same key of the same caller with the same request is the same operation, for as long as operations are kept.
//
// # How
//
// Submit writes a row of the request and a message of its ID in one transaction. The message comes through relay and broker to the consumer
// group "operations", whose handler executes the call through a connect.Server with the same handlers and interceptors that serve callers. The
// inbox's transaction is handed on in the context, where the handler's own transactions become parts of it (postgres.Join).
//
// A handler's error is the call's result, unless another try may end otherwise: unavailable, aborted, or too much backlog. Then the inbox tries it
// again, later, and gives it up as it does with any message: the operation fails, and the message is kept as a dead letter for the operators.
package operations

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/changes"
	operationsv1 "example.com/shop/internal/gen/shop/operations/v1"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/unary"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
)

// Config sets up Operations.
type Config struct {
	// Identity is how callers are known. The zero value knows nobody: all calls are the same caller's.
	Identity Identity
	// Keys sign who the caller of an operation is, with HMAC-SHA256. The first one signs, and all are accepted: a new key is put first while the old
	// one stays until the last operation that it signed has been executed. At least 32 bytes each. Without keys nothing is signed, and all is accepted.
	Keys [][]byte
}

// Operations takes durable calls and tells what became of them: it implements shop.operations.v1.OperationService.
type Operations struct {
	db     *pgxpool.Pool
	out    *outbox.Writer
	config Config
	topic  *changes.Topic[*operationsv1.Operation]
}

// New makes Operations on db, whose calls are submitted through out. Changes travel by hub.
func New(db *pgxpool.Pool, out *outbox.Writer, hub *changes.Hub, config Config) *Operations {
	config.check()
	o := &Operations{db: db, out: out, config: config}
	o.topic = changes.NewTopic(hub, "operation", o.read)
	return o
}

// Call is a call to be executed later.
type Call struct {
	// Procedure is the method, as Connect names it: ordersv1connect.OrderServicePlaceOrderProcedure.
	Procedure string
	// Request is the method's request. It must be valid: it is checked when it is executed.
	Request proto.Message
	// Key tells a repeated submit from a new one, among those of the same caller; "" means that each is new. At most 255 bytes.
	Key string
}

const submitSQL = `
INSERT INTO operation (id, caller, idempotency_key, method, request, request_hash, identity, signature)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
-- Of several with one key the first inserts; the others wait for its commit here and then get no row.
ON CONFLICT (caller, idempotency_key) WHERE idempotency_key <> '' DO NOTHING`

// Submit stages a call as part of tx, for the caller whom ctx knows, and returns the operation's name. It is executed if tx commits.
//
// It returns a Connect error that may be shown: failed_precondition if the method is not declared IDEMPOTENT, already_exists if the key was used for
// another call.
func (o *Operations) Submit(ctx context.Context, tx pgx.Tx, call Call) (name string, err error) {
	one, err := o.stage(ctx, call)
	if err != nil {
		return "", err
	}
	tag, err := tx.Exec(ctx, submitSQL, one.id, one.caller, one.key, one.method, messaging.NotNil(one.request), one.hash,
		messaging.NotNil(one.identity), messaging.NotNil(o.config.sign(one.ticket)))
	if err != nil {
		return "", fmt.Errorf("insert operation: %w", err)
	}
	if tag.RowsAffected() == 0 {
		name, found, err := one.submitted(ctx, tx)
		if err == nil && !found { // forgotten this very moment
			err = connect.NewError(connect.CodeAborted, "the idempotency key has just expired; nothing was done, try again")
		}
		return name, err
	}
	message := messaging.New("", &operationsv1.OperationSubmitted{OperationId: one.id.String(), Method: one.method})
	message.ID = one.id
	return nameOf(one.id), outbox.Insert(ctx, tx, message)
}

// Submitted returns the name of the operation that an earlier Submit has made of the same call, if the call has a key
// and there is one. It writes nothing. It returns already_exists if the key was used for another call.
func (o *Operations) Submitted(ctx context.Context, tx pgx.Tx, call Call) (name string, found bool, err error) {
	one, err := o.stage(ctx, call)
	if err != nil || call.Key == "" {
		return "", false, err
	}
	return one.submitted(ctx, tx)
}

// staged is a call that is ready to be submitted.
type staged struct {
	ticket
	key  string
	hash []byte
}

// stage makes a new operation of a call.
func (o *Operations) stage(ctx context.Context, call Call) (one staged, err error) {
	if err := submittable(call); err != nil {
		return one, err
	}
	one.method, one.key = methodName(call.Procedure), call.Key
	if one.id, err = uuid.NewV7(); err != nil {
		return one, fmt.Errorf("make operation id: %w", err)
	}
	if one.request, err = proto.Marshal(call.Request); err != nil {
		return one, fmt.Errorf("encode request: %w", err)
	}
	if one.hash, err = unary.Hash(call.Request); err != nil {
		return one, err
	}
	one.caller, one.identity, err = o.config.Identity.capture(ctx)
	return one, err
}

const submittedSQL = `
SELECT id, method = $3 AND request_hash = $4 FROM operation WHERE caller = $1 AND idempotency_key = $2`

// submitted returns the operation that has the key, if there is one. It is an error if that is of another call.
func (s staged) submitted(ctx context.Context, tx pgx.Tx) (name string, found bool, err error) {
	var id uuid.UUID
	var same bool
	err = tx.QueryRow(ctx, submittedSQL, s.caller, s.key, s.method, s.hash).Scan(&id, &same)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return "", false, nil
	case err != nil:
		return "", false, fmt.Errorf("read operation of key: %w", err)
	case !same:
		return "", false, connect.NewError(connect.CodeAlreadyExists, "the idempotency key was used for another call")
	}
	return nameOf(id), true, nil
}

// maxKey is the longest idempotency key in bytes.
const maxKey = 255

// submittable refuses calls that cannot be made later: a message may be handled more than once, and so may then the call.
func submittable(call Call) error {
	method, err := methodOf(methodName(call.Procedure))
	if err != nil {
		return err
	}
	options, _ := method.Options().(*descriptorpb.MethodOptions)
	switch {
	case method.IsStreamingClient() || method.IsStreamingServer():
		return connect.Errorf(connect.CodeFailedPrecondition, "%s is a stream; only unary calls can be executed later", call.Procedure)
	case options.GetIdempotencyLevel() != descriptorpb.MethodOptions_IDEMPOTENT:
		return connect.Errorf(connect.CodeFailedPrecondition,
			"%s cannot be executed later: its proto file must declare it with option idempotency_level = IDEMPOTENT", call.Procedure)
	case call.Request.ProtoReflect().Descriptor().FullName() != method.Input().FullName():
		return connect.Errorf(connect.CodeInvalidArgument, "the request of %s is a %s", call.Procedure, method.Input().FullName())
	case len(call.Key) > maxKey || !messaging.ValidText(call.Key):
		return connect.Errorf(connect.CodeInvalidArgument, "an idempotency key is UTF-8 without NUL of at most %d bytes", maxKey)
	}
	return nil
}

// methodOf finds a method that is linked in, by the name that Operation.method has.
func methodOf(name string) (protoreflect.MethodDescriptor, error) {
	found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(strings.ReplaceAll(name, "/", ".")))
	method, ok := found.(protoreflect.MethodDescriptor)
	if err != nil || !ok {
		return nil, connect.Errorf(connect.CodeUnimplemented, "there is no method %s", name)
	}
	return method, nil
}

// methodName is a procedure as Operation.method shows it.
func methodName(procedure string) string { return strings.TrimPrefix(procedure, "/") }

const namePrefix = "operations/"

func nameOf(id uuid.UUID) string { return namePrefix + id.String() }

func parseName(name string) (uuid.UUID, error) {
	id, err := uuid.Parse(strings.TrimPrefix(name, namePrefix))
	if err != nil || name != nameOf(id) {
		return uuid.Nil, errNotFound(name)
	}
	return id, nil
}

func errNotFound(name string) error {
	return connect.Errorf(connect.CodeNotFound, "operation %s does not exist", name)
}
