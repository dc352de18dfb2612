// Package console serves the operators' console: ops.v1.OpsService, and the page that talks to it.
//
// Every change goes through package ops, as with the commands: the audit log records it with the caller's name and a
// reason in the same transaction. The load on database and broker does not depend on the number of watchers: one sample
// per second serves all of them. The console keeps 15 minutes of samples, in memory.
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
	"example.com/shop/internal/ops"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Config configures a Console.
type Config struct {
	DB *pgxpool.Pool
	// Groups are the consumer groups.
	Groups []Group
	// Depths returns how many messages and consumers queues have.
	Depths func(ctx context.Context, queues []string) ([]rabbit.Depth, error)
	// Dangers returns the broker's policies that are dangerous to the queues. The console calls it twice a minute, and
	// ignores errors.
	Dangers func(ctx context.Context) ([]rabbit.Danger, error)
	// APIs are the application names of the sessions of processes that serve the API.
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
	config   Config
	db       *pgxpool.Pool
	operator ops.Operator
	flow     *flow
}

// New makes a Console. Its flow has no samples until Run runs.
func New(config Config) *Console {
	c := &Console{config: config, db: config.DB, flow: newFlow(), operator: ops.Operator{DB: config.DB}}
	for _, group := range config.Groups {
		c.operator.Groups = append(c.operator.Groups, group.Group)
	}
	return c
}

// Roles in ops.proto.
const (
	observerRole = "observer"
	operatorRole = "operator"
)

// GetSession implements ops.v1.OpsService.
func (c *Console) GetSession(ctx context.Context, _ *opsv1.GetSessionRequest) (*opsv1.GetSessionResponse, error) {
	caller, _ := auth.FromContext(ctx)
	off := caller.By == "nothing"
	response := &opsv1.GetSessionResponse{
		Actor: actor(ctx), Service: c.config.Service, Version: c.config.Version,
		Groups: ops.Names(c.operator.Groups),
		MayAct: off || slices.Contains(caller.Roles, operatorRole),
	}
	response.MayLook = response.MayAct || slices.Contains(caller.Roles, observerRole)
	for _, reason := range deadletter.Reasons {
		response.Causes = append(response.Causes, string(reason))
	}
	return response, nil
}

// actor returns the caller's name for the audit log.
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

// note returns the actor and the reason for the audit log.
func note(ctx context.Context, reason string) deadletter.Note {
	return deadletter.Note{Actor: actor(ctx), Reason: strings.TrimSpace(reason)}
}

// storable refuses texts that Postgres cannot take.
func storable(texts ...string) error {
	for _, text := range texts {
		if !messaging.ValidText(text) {
			return connect.NewError(connect.CodeInvalidArgument, "texts must be UTF-8 without NUL")
		}
	}
	return nil
}

// publicError converts an error to one that callers may see.
func publicError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.As(err, new(ops.Refusal)):
		return connect.NewError(connect.CodeFailedPrecondition, err.Error())
	case errors.Is(err, ops.ErrTooSlow):
		return connect.NewError(connect.CodeDeadlineExceeded, err.Error())
	}
	return postgres.Classify(err)
}
