// Package operations implements durable calls. A durable call is a unary call that is accepted now and executed
// later. Its result is stored.
//
// # What it guarantees
//
// An accepted call is executed until it has a result: a response, an error of its handler, or an error that says that
// it was given up. The result survives the death of every process. One transaction commits the result, everything
// that the handler wrote through postgres.Transact or outbox.Writer.Transact, and the inbox row of the call's
// message. So each call has one result. Its effect in this database is made exactly once if the result is a response,
// and not at all if it is an error.
//
// Effects elsewhere may happen more than once, and so may writes outside of those transactions. Therefore only
// methods that are declared IDEMPOTENT can be called durably.
//
// The same key of the same caller with the same request is the same operation, for as long as operations are stored.
//
// # How it works
//
// Submit writes a row with the request and a message with its ID in one transaction. The message travels through
// relay and broker to the consumer group "operations". Its handler executes the call through a connect.Server that
// has the same handlers and interceptors as the server for callers. The context passes on the inbox's transaction,
// and the handler's own transactions become parts of it (postgres.Join).
//
// A handler's error is the call's result, unless another attempt may succeed: unavailable, aborted, or a full
// backlog. Then the inbox retries the call later, and gives up as with any message: the operation fails, and the
// message becomes a dead letter for the operators.
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
	// Identity identifies callers. With the zero value, all calls have the same caller.
	Identity Identity
	// Keys sign the caller of an operation and its call, with HMAC-SHA256. The first key signs, and all keys are
	// accepted. To rotate keys, put the new key first, and keep the old one until the last operation that it signed
	// has been executed. Each key has at least 32 bytes. Without keys nothing is signed, and everything is accepted.
	Keys [][]byte
}

// Operations accepts durable calls and returns their state. It implements shop.operations.v1.OperationService.
type Operations struct {
	db     *pgxpool.Pool
	out    *outbox.Writer
	config Config
	topic  *changes.Topic[*operationsv1.Operation]
}

// New makes Operations on db. Calls are submitted through out. Changes are sent through hub.
func New(db *pgxpool.Pool, out *outbox.Writer, hub *changes.Hub, config Config) *Operations {
	config.check()
	o := &Operations{db: db, out: out, config: config}
	o.topic = changes.NewTopic(hub, "operation", o.read)
	return o
}

// Call is a call to be executed later.
type Call struct {
	// Procedure is the method as Connect names it, such as ordersv1connect.OrderServicePlaceOrderProcedure.
	Procedure string
	// Request is the method's request. It must be valid: it is validated only when the call is executed.
	Request proto.Message
	// Key identifies repeated submits of one caller. If it is "", each submit is new. At most 255 bytes.
	Key string
	// NotifyKey asks for a message OperationEnded with this key when the call has ended, such as the ID of an object
	// that waits for the result. A consumer group must handle that type. With "" there is no message. At most 255 bytes.
	// Of several submits with one Key, the first decides.
	NotifyKey string
}

const submitSQL = `
INSERT INTO operation (id, caller, idempotency_key, method, request, request_hash, identity, signature)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
-- The first of several submits with one key inserts the row. The others wait here for its commit, and insert nothing.
ON CONFLICT (caller, idempotency_key) WHERE idempotency_key <> '' DO NOTHING`

// Submit submits a call of ctx's caller as part of tx, and returns the operation's name. The call is executed if tx
// commits.
//
// It returns a Connect error that callers may see: failed_precondition if the method is not declared IDEMPOTENT,
// already_exists if the key was used for another call.
func (o *Operations) Submit(ctx context.Context, tx pgx.Tx, call Call) (name string, err error) {
	s, err := o.stage(ctx, call)
	if err != nil {
		return "", err
	}
	tag, err := tx.Exec(ctx, submitSQL, s.id, s.caller, s.key, s.method, messaging.NotNil(s.request), s.hash,
		messaging.NotNil(s.identity), messaging.NotNil(o.config.sign(s.ticket)))
	if err != nil {
		return "", fmt.Errorf("insert operation: %w", err)
	}
	if tag.RowsAffected() == 0 {
		name, found, err := s.submitted(ctx, tx)
		if err == nil && !found { // swept between the two statements
			err = connect.NewError(connect.CodeAborted,
				"the idempotency key has just expired; nothing was done, try again")
		}
		return name, err
	}
	message := messaging.New("", &operationsv1.OperationSubmitted{
		OperationId: s.id.String(), Method: s.method, NotifyKey: call.NotifyKey,
	})
	message.ID = s.id
	return nameOf(s.id), outbox.Insert(ctx, tx, message)
}

// Submitted returns the name of the operation that an earlier Submit of the same call has created, if the call has a
// key and the operation exists. It writes nothing. It returns already_exists if the key was used for another call.
func (o *Operations) Submitted(ctx context.Context, tx pgx.Tx, call Call) (name string, found bool, err error) {
	s, err := o.stage(ctx, call)
	if err != nil || call.Key == "" {
		return "", false, err
	}
	return s.submitted(ctx, tx)
}

// staged is a call that is ready to be submitted.
type staged struct {
	ticket
	key  string
	hash []byte
}

// stage prepares a call as a new operation.
func (o *Operations) stage(ctx context.Context, call Call) (s staged, err error) {
	if err := submittable(call); err != nil {
		return s, err
	}
	s.method, s.key = methodName(call.Procedure), call.Key
	if s.id, err = uuid.NewV7(); err != nil {
		return s, fmt.Errorf("make operation id: %w", err)
	}
	if s.request, err = proto.Marshal(call.Request); err != nil {
		return s, fmt.Errorf("encode request: %w", err)
	}
	if s.hash, err = unary.Hash(call.Request); err != nil {
		return s, err
	}
	s.caller, s.identity, err = o.config.Identity.capture(ctx)
	return s, err
}

const submittedSQL = `
SELECT id, method = $3 AND request_hash = $4 FROM operation WHERE caller = $1 AND idempotency_key = $2`

// submitted returns the name of the operation with the key, if there is one. It returns an error if the operation is of
// another call.
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

// submittable refuses calls that cannot be executed later. A message may be handled more than once, so the method
// must be idempotent.
func submittable(call Call) error {
	method, err := methodOf(methodName(call.Procedure))
	if err != nil {
		return err
	}
	options, _ := method.Options().(*descriptorpb.MethodOptions)
	switch {
	case method.IsStreamingClient() || method.IsStreamingServer():
		return connect.Errorf(connect.CodeFailedPrecondition,
			"%s is a stream; only unary calls can be executed later", call.Procedure)
	case options.GetIdempotencyLevel() != descriptorpb.MethodOptions_IDEMPOTENT:
		return connect.Errorf(connect.CodeFailedPrecondition,
			"%s cannot be executed later: its proto file must set option idempotency_level = IDEMPOTENT",
			call.Procedure)
	case call.Request.ProtoReflect().Descriptor().FullName() != method.Input().FullName():
		return connect.Errorf(connect.CodeInvalidArgument,
			"request of %s must be a %s", call.Procedure, method.Input().FullName())
	case len(call.Key) > maxKey || !messaging.ValidText(call.Key):
		return connect.Errorf(connect.CodeInvalidArgument,
			"idempotency key must be UTF-8 without NUL, of at most %d bytes", maxKey)
	case len(call.NotifyKey) > messaging.MaxKey || !messaging.ValidText(call.NotifyKey):
		return connect.Errorf(connect.CodeInvalidArgument,
			"notify key must be UTF-8 without NUL, of at most %d bytes", messaging.MaxKey)
	}
	return nil
}

// methodOf returns a method that is linked in, by its name in Operation.method.
func methodOf(name string) (protoreflect.MethodDescriptor, error) {
	fullName := protoreflect.FullName(strings.ReplaceAll(name, "/", "."))
	found, err := protoregistry.GlobalFiles.FindDescriptorByName(fullName)
	method, ok := found.(protoreflect.MethodDescriptor)
	if err != nil || !ok {
		return nil, connect.Errorf(connect.CodeUnimplemented, "method %s does not exist", name)
	}
	return method, nil
}

// methodName returns the name of a procedure in Operation.method.
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
