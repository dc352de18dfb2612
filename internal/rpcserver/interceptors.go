package rpcserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/bounds"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
)

// Interceptors returns the interceptors for every call over any transport, the outermost first: request ID, access
// log, recovery from panics and error mapping, validation, the given interceptors. New uses them. A server for
// another transport should use them, too.
//
// A request is validated when the handler, or a given interceptor, receives it. Authentication does not receive it,
// and so comes before validation.
//
// This is the only place that decides which parts of an error callers may see. A *connect.Error that a handler
// returns is meant for the caller and passes, unless it is the error of a call to another service: see ofOtherService.
// postgres.ErrUnavailable, ErrBusy and ErrOutcomeUnknown become unavailable, each with its own text.
// outbox.ErrBacklogFull becomes resource_exhausted. The end of the call's context becomes canceled or
// deadline_exceeded. Any other error is logged and becomes internal with a fixed text. Texts and details are cut to the
// limits of package bounds.
func Interceptors(log *slog.Logger, inner ...connect.ServerInterceptor) []connect.ServerInterceptor {
	outer := []connect.ServerInterceptor{nameRequest, logAccess(log), answerErrors(log), validateRequests()}
	return append(outer, inner...)
}

// logAccess logs the caller, the procedure and the result of each call, but nothing of its messages.
func logAccess(log *slog.Logger) connect.ServerInterceptor {
	return func(next connect.ServerFunc) connect.ServerFunc {
		return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
			started := time.Now()
			ctx = auth.Visit(ctx)
			err := next(ctx, spec, stream)
			level, code := slog.LevelDebug, "ok"
			if err != nil {
				level, code = slog.LevelInfo, connect.CodeOf(err).String()
			}
			if log.Enabled(ctx, level) {
				info, _ := connect.CallInfoForServerContext(ctx)
				caller, _ := auth.FromContext(ctx)
				log.Log(ctx, level, "rpc", "procedure", spec.Procedure, "code", code, "duration", time.Since(started),
					"protocol", info.Protocol, "peer", info.PeerAddr, "caller", caller.Subject,
					"request_id", RequestID(ctx))
			}
			return err
		}
	}
}

func answerErrors(log *slog.Logger) connect.ServerInterceptor {
	return func(next connect.ServerFunc) connect.ServerFunc {
		return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) (err error) {
			defer func() {
				if p := recover(); p != nil {
					switch p.(type) {
					case error, string:
					default:
						p = fmt.Sprintf("%T", p) // may be a request, which must not be logged
					}
					log.ErrorContext(ctx, "rpc panicked", "procedure", spec.Procedure, "panic", p,
						"stack", string(debug.Stack()), "request_id", RequestID(ctx))
					err = errInternal
				}
			}()
			if err := next(ctx, spec, callerStream{stream}); err != nil {
				answer, level := public(ctx, err)
				cause := slog.Any("error", err)
				if answer.Code() == connect.CodeInvalidArgument {
					cause = slog.Attr{} // the caller gets the text, which quotes the invalid part of the message
				}
				log.Log(ctx, level, "rpc failed", "procedure", spec.Procedure, "code", answer.Code().String(), cause,
					"request_id", RequestID(ctx))
				return bounds.Error(answer).WithCause(err)
			}
			return nil
		}
	}
}

// callerStream attributes errors of the stream to the caller, malformed messages among them. Connect returns internal
// for an invalid frame, as gRPC's specification requires. But then any caller could trigger alerts.
type callerStream struct{ connect.ServerStream }

func (s callerStream) Receive(message any) error {
	err := s.ServerStream.Receive(message)
	var malformed *connect.Error
	switch {
	case !errors.As(err, &malformed):
		return err
	case errors.Is(err, bounds.ErrTooManyFields):
		err = connect.NewError(connect.CodeResourceExhausted, bounds.ErrTooManyFields.Error()).WithCause(err)
	case malformed.Code() == connect.CodeInternal, malformed.Code() == connect.CodeUnknown:
		err = connect.NewError(connect.CodeInvalidArgument, malformed.Message()).WithCause(err)
	}
	return callerError{err}
}

func (s callerStream) Send(message any) error {
	err := s.ServerStream.Send(message)
	var failed *connect.Error
	if !errors.As(err, &failed) {
		return err
	}
	return callerError{err}
}

// callerError is an error of the caller's stream.
type callerError struct{ error }

func (e callerError) Unwrap() error { return e.error }

var errInternal = connect.NewError(connect.CodeInternal, "internal error")

// public returns the error that the caller may see, and the level at which to log err.
func public(ctx context.Context, err error) (*connect.Error, slog.Level) {
	var own *connect.Error
	switch {
	case errors.Is(context.Cause(ctx), errDraining):
		return connect.NewError(connect.CodeUnavailable, "server is shutting down, try again"), slog.LevelDebug
	case errors.Is(context.Cause(ctx), errQuiet):
		return connect.NewError(connect.CodeUnavailable, "stream was idle for too long, open it again"), slog.LevelDebug
	case errors.As(err, new(callerError)):
		return ofCaller(ctx, err)
	case errors.As(err, &own) && !fromOtherService(own):
		return own, slog.LevelDebug
	case errors.Is(err, postgres.ErrOutcomeUnknown):
		return connect.NewError(connect.CodeUnavailable,
			"the outcome is unknown: the call may or may not have been executed; "+
				"repeat it with the same ID, which is safe"), slog.LevelWarn
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, "deadline exceeded"), slog.LevelDebug
	case ctx.Err() != nil:
		return connect.NewError(connect.CodeCanceled, "canceled"), slog.LevelDebug
	case errors.Is(err, outbox.ErrBacklogFull):
		return connect.NewError(connect.CodeResourceExhausted,
			"the backlog is full; nothing was done, try again later"), slog.LevelWarn
	case errors.Is(err, outbox.ErrClock): // the clock of another process may be right
		return connect.NewError(connect.CodeUnavailable,
			"this server's clock is wrong; nothing was done, try again"), slog.LevelError
	case errors.Is(err, postgres.ErrUnavailable):
		return connect.NewError(connect.CodeUnavailable, "database is unavailable, try again"), slog.LevelWarn
	case errors.Is(err, postgres.ErrBusy):
		return connect.NewError(connect.CodeUnavailable,
			"database is busy; nothing was done, try again"), slog.LevelWarn
	case own != nil:
		return ofOtherService(own)
	}
	return errInternal, slog.LevelError
}

// ofCaller returns the public error for an error of the caller's stream.
func ofCaller(ctx context.Context, err error) (*connect.Error, slog.Level) {
	var own *connect.Error
	switch late := errors.Is(err, os.ErrDeadlineExceeded); {
	case late && draining(ctx): // the drain ends bodies that have not arrived
		return connect.NewError(connect.CodeUnavailable, "server is shutting down, try again"), slog.LevelDebug
	case late: // deadline of the body; Connect's text contains addresses
		return connect.NewError(connect.CodeDeadlineExceeded, "request did not arrive in time"), slog.LevelDebug
	case errors.As(err, &own):
		return own, slog.LevelDebug
	}
	return errInternal, slog.LevelError
}
