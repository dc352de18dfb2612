// Package console serves the operators' console: ops.v1.OpsService, and the page that talks to it.
//
// It guarantees that what it changes goes through package ops, as the commands do, and so is recorded with the caller's
// name and a reason in the transaction that changes it. Looking costs the same however many look: one reading of the
// database and the broker a second serves all. It keeps no more than 15 minutes of numbers, in memory.
package console

import (
	"context"
	"errors"
	"slices"
	"strings"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/deadletter"
	opsv1 "example.com/shop/internal/gen/ops/v1"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/operations"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Config says what there is to be looked at.
type Config struct {
	DB         *pgxpool.Pool
	Operations *operations.Operations
	// Groups are the consumer groups.
	Groups []Group
	// Depths asks the broker how full queues are.
	Depths func(ctx context.Context, queues []string) ([]rabbit.Depth, error)
	// Dangers asks which policies of the broker are dangerous to the queues. It is asked twice a minute; its failure is
	// nobody's fault.
	Dangers func(ctx context.Context) ([]rabbit.Danger, error)
	// APIs are the names under which the processes that take calls are known to the database.
	APIs             []string
	Service, Version string
}

// Group is a consumer group and its queue.
type Group struct {
	ops.Group
	Queue string
}

// Console implements ops.v1.OpsService.
type Console struct {
	config Config
	db     *pgxpool.Pool
	desk   ops.Operator
	groups []ops.Group
	flow   *flow
}

// New makes a Console. Its flow stands still until Run runs.
func New(config Config) *Console {
	c := &Console{config: config, db: config.DB, flow: newFlow(), desk: ops.Operator{DB: config.DB}}
	for _, group := range config.Groups {
		c.groups = append(c.groups, group.Group)
		c.desk.Groups = append(c.desk.Groups, group.Name)
	}
	return c
}

// The roles that ops.proto names.
const (
	observer = "observer"
	operator = "operator"
)

// GetSession implements ops.v1.OpsService.
func (c *Console) GetSession(ctx context.Context, _ *opsv1.GetSessionRequest) (*opsv1.GetSessionResponse, error) {
	caller, _ := auth.FromContext(ctx)
	off := caller.By == "nothing"
	response := &opsv1.GetSessionResponse{
		Actor: actor(ctx), Service: c.config.Service, Version: c.config.Version, Groups: c.desk.Groups,
		MayAct: off || slices.Contains(caller.Roles, operator),
	}
	response.MayLook = response.MayAct || slices.Contains(caller.Roles, observer)
	for _, reason := range deadletter.Reasons {
		response.Causes = append(response.Causes, string(reason))
	}
	return response, nil
}

// actor is what the audit log calls the caller.
func actor(ctx context.Context) string {
	caller, known := auth.FromContext(ctx)
	switch {
	case !known:
		return ""
	case caller.By == "nothing":
		return caller.Subject
	}
	return caller.By + ":" + caller.Subject
}

// note is why the caller does something.
func note(ctx context.Context, reason string) deadletter.Note {
	return deadletter.Note{Actor: actor(ctx), Reason: strings.TrimSpace(reason)}
}

// storable refuses texts that Postgres cannot take.
func storable(texts ...string) error {
	for _, text := range texts {
		if !messaging.ValidText(text) {
			return connect.NewError(connect.CodeInvalidArgument, "texts are UTF-8 without NUL")
		}
	}
	return nil
}

// tell makes of an error what the caller may read.
func tell(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.As(err, new(ops.Refusal)), errors.Is(err, operations.ErrBegun):
		return connect.NewError(connect.CodeFailedPrecondition, err.Error())
	case errors.Is(err, ops.ErrTooSlow):
		return connect.NewError(connect.CodeDeadlineExceeded, err.Error())
	}
	return postgres.Classify(err)
}
