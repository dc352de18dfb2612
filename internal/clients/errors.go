package clients

import (
	"context"
	"errors"
	"slices"

	"connectrpc.com/connect/v2"
)

// Pass returns an error that passes on the verdict of another service: the caller gets its code with a fixed text,
// without the details. It does so only if err has one of the given codes; otherwise it returns err. Use it if the code
// means the same to the handler's caller as to the handler. To say more, return a connect.Error with your own text.
func Pass(err error, codes ...connect.Code) error {
	var verdict *connect.Error
	if !errors.As(err, &verdict) || !slices.Contains(codes, verdict.Code()) {
		return err
	}
	code := verdict.Code()
	return connect.Errorf(code, "a service that this one calls answered %s", code).WithCause(err)
}

// markErrors marks every error of a call as remote (connect.Error.IsRemote). A transport reports its own failures, such
// as an address that refuses connections, with the same type of error that a handler returns for its caller. Package
// rpcserver shows callers at most the code of a remote error; docs/security.md lists which code.
func markErrors(next connect.ClientFunc) connect.ClientFunc {
	return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
		stream, err := next(ctx, spec)
		if err != nil {
			return nil, marked(err)
		}
		return markedStream{stream}, nil
	}
}

// marked returns err as a remote error. The end of a stream is no error, and errors without a code need no mark: they
// never reach a caller.
func marked(err error) error {
	var coded *connect.Error
	if !errors.As(err, &coded) {
		return err
	}
	return coded.WithRemote()
}

// markedStream marks the errors of a stream.
type markedStream struct{ connect.ClientStream }

func (s markedStream) SendHeaders() error        { return marked(s.ClientStream.SendHeaders()) }
func (s markedStream) Send(message any) error    { return marked(s.ClientStream.Send(message)) }
func (s markedStream) CloseSend() error          { return marked(s.ClientStream.CloseSend()) }
func (s markedStream) Receive(message any) error { return marked(s.ClientStream.Receive(message)) }
func (s markedStream) Close() error              { return marked(s.ClientStream.Close()) }
