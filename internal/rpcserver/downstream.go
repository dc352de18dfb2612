package rpcserver

import (
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"syscall"

	"connectrpc.com/connect/v2"
)

// ofOtherService returns the public error for the error of a call that the handler made. Its text and details were for
// this service, and nothing of them reaches the caller.
//
// If the other service, or the way to it, does not work now, the caller gets unavailable and may repeat the call. Every
// other verdict, such as not_found, is about a request that the caller does not know. A handler that knows what the
// verdict means for its caller returns an error of its own, or uses clients.Pass. Otherwise the handler is at fault,
// and the caller gets internal.
func ofOtherService(err *connect.Error) (*connect.Error, slog.Level) {
	again := networkFailure(err) != nil
	switch err.Code() {
	case connect.CodeUnavailable, connect.CodeResourceExhausted, connect.CodeAborted,
		connect.CodeDeadlineExceeded, connect.CodeCanceled: // the caller's own deadline has not passed
		again = true
	}
	if again {
		return connect.NewError(connect.CodeUnavailable,
			"a service that this one calls is unavailable, try again with the same ID"), slog.LevelWarn
	}
	return errInternal, slog.LevelError
}

// fromOtherService reports whether err comes from a call to another service. A client of package clients marks its
// errors. Any other client is recognized only if its error quotes a failure of the network.
func fromOtherService(err *connect.Error) bool {
	failure := networkFailure(err)
	return err.IsRemote() || failure != nil && strings.Contains(err.Message(), failure.Error())
}

// networkFailure returns the failure of the network that caused err, or nil.
func networkFailure(err *connect.Error) error {
	var network net.Error
	var certificate *tls.CertificateVerificationError
	var number syscall.Errno
	cause := err.Unwrap()
	switch {
	case errors.As(cause, &network):
		return network
	case errors.As(cause, &certificate):
		return certificate
	case errors.As(cause, &number):
		return number
	case errors.Is(cause, io.ErrUnexpectedEOF):
		return io.ErrUnexpectedEOF
	}
	return nil
}
