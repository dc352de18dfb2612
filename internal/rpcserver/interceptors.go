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

// Interceptors returns what every call goes through, whatever it came by, the outermost first: request ID, access log, recovery from
// panics and error mapping, validation, the given interceptors. New uses them; a server for another transport should, too.
//
// A request is checked when it is received, which is in the handler or in a given interceptor that reads it: so authentication, which does not, comes
// before validation all the same.
//
// This is the only place that decides what a caller may see of an error. A *connect.Error that a handler returns is meant
// for the caller and passes, unless it is another server's. postgres.ErrUnavailable, ErrBusy and ErrOutcomeUnknown
// become unavailable, each with a text of its own; outbox.ErrBacklogFull becomes resource_exhausted; the end of the
// call's context becomes canceled or deadline_exceeded. Anything else is logged and becomes internal with a fixed text.
// Texts and details are cut to what package bounds allows.
func Interceptors(log *slog.Logger, inner ...connect.ServerInterceptor) []connect.ServerInterceptor {
	return append([]connect.ServerInterceptor{nameRequest, logAccess(log), answerErrors(log), validateRequests()}, inner...)
}

// logAccess says who called what and how it went, and nothing of what was said.
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
					"protocol", info.Protocol, "peer", info.PeerAddr, "caller", caller.Subject, "request_id", RequestID(ctx))
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
						p = fmt.Sprintf("%T", p) // a request, perhaps: what is in it is not for the log
					}
					log.ErrorContext(ctx, "rpc panicked", "procedure", spec.Procedure, "panic", p, "stack", string(debug.Stack()),
						"request_id", RequestID(ctx))
					err = errInternal
				}
			}()
			if err := next(ctx, spec, received{stream}); err != nil {
				answer, level := public(ctx, err)
				why := slog.Any("error", err)
				if answer.Code() == connect.CodeInvalidArgument {
					why = slog.Attr{} // the caller is told; the text quotes what could not be decoded
				}
				log.Log(ctx, level, "rpc failed", "procedure", spec.Procedure, "code", answer.Code().String(), why, "request_id", RequestID(ctx))
				return bounds.Error(answer).WithCause(err)
			}
			return nil
		}
	}
}

// received is a stream whose malformed messages are the caller's fault. Connect says internal when what arrives is no frame of its protocol, as
// gRPC's specification wants; but then a caller could raise alarms at will.
type received struct{ connect.ServerStream }

func (s received) Receive(message any) error {
	err := s.ServerStream.Receive(message)
	var malformed *connect.Error
	switch {
	case !errors.As(err, &malformed):
	case errors.Is(err, bounds.ErrTooManyFields):
		return connect.NewError(connect.CodeResourceExhausted, bounds.ErrTooManyFields.Error()).WithCause(err)
	case malformed.Code() == connect.CodeInternal, malformed.Code() == connect.CodeUnknown:
		return connect.NewError(connect.CodeInvalidArgument, malformed.Message()).WithCause(err)
	}
	return err
}

var errInternal = connect.NewError(connect.CodeInternal, "internal error")

// public returns what the caller may see of err, and how loudly the rest, which only the log gets to see, should be said.
func public(ctx context.Context, err error) (*connect.Error, slog.Level) {
	var own *connect.Error
	switch {
	case errors.Is(context.Cause(ctx), errDraining):
		return connect.NewError(connect.CodeUnavailable, "server is shutting down, try again"), slog.LevelDebug
	case errors.Is(context.Cause(ctx), errQuiet):
		return connect.NewError(connect.CodeUnavailable, "nothing has happened for a while, open the stream again"), slog.LevelDebug
	case errors.As(err, &own) && !own.IsRemote():
		if errors.Is(err, os.ErrDeadlineExceeded) && draining(ctx) { // which ends bodies that have not arrived
			return connect.NewError(connect.CodeUnavailable, "server is shutting down, try again"), slog.LevelDebug
		}
		if errors.Is(err, os.ErrDeadlineExceeded) { // of the body; Connect's text for it names addresses
			return connect.NewError(connect.CodeDeadlineExceeded, "request did not arrive in time"), slog.LevelDebug
		}
		return own, slog.LevelDebug
	case errors.Is(err, postgres.ErrOutcomeUnknown):
		return connect.NewError(connect.CodeUnavailable,
			"the outcome is unknown: it may have been done or not; repeat the call with the same ID, which is safe"), slog.LevelWarn
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, "deadline exceeded"), slog.LevelDebug
	case ctx.Err() != nil:
		return connect.NewError(connect.CodeCanceled, "canceled"), slog.LevelDebug
	case errors.Is(err, outbox.ErrBacklogFull):
		return connect.NewError(connect.CodeResourceExhausted, "too much is waiting to be processed; nothing was done, try again later"), slog.LevelWarn
	case errors.Is(err, outbox.ErrClock): // which another process may not have
		return connect.NewError(connect.CodeUnavailable, "this server's clock is wrong; nothing was done, try again"), slog.LevelError
	case errors.Is(err, postgres.ErrUnavailable):
		return connect.NewError(connect.CodeUnavailable, "database is unavailable, try again"), slog.LevelWarn
	case errors.Is(err, postgres.ErrBusy):
		return connect.NewError(connect.CodeUnavailable, "others are in the way; nothing was done, try again"), slog.LevelWarn
	}
	return errInternal, slog.LevelError
}
