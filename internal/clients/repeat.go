package clients

import (
	"cmp"
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/cenkalti/backoff/v5"
)

// repeat repeats unary calls of methods that may be repeated while the other service is unavailable.
func (c Config) repeat() connect.ClientInterceptor {
	attempts := cmp.Or(c.Attempts, 4)
	return func(next connect.ClientFunc) connect.ClientFunc {
		return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
			once := spec.IdempotencyLevel == connect.IdempotencyUnknown || attempts == 1
			if once || spec.StreamType != connect.StreamTypeUnary {
				return next(ctx, spec)
			}
			ctx, cancel := context.WithCancel(ctx)
			return &repeated{config: c, attempts: attempts, ctx: ctx, cancel: cancel, spec: spec, next: next}, nil
		}
	}
}

// repeated presents all attempts of a unary call as one stream. It sends nothing before Receive.
type repeated struct {
	config   Config
	attempts int
	ctx      context.Context // ends with Close, so that Close unblocks Receive
	cancel   context.CancelFunc
	spec     connect.Spec
	next     connect.ClientFunc

	mu       sync.Mutex // Receive and Close may be called at once
	request  any
	sent     bool
	received bool
}

// SendHeaders implements connect.ClientStream.
func (r *repeated) SendHeaders() error { return nil }

// Send implements connect.ClientStream.
func (r *repeated) Send(message any) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.sent {
		return errors.New("a unary call has only one request")
	}
	r.request, r.sent = message, true
	return nil
}

// CloseSend implements connect.ClientStream.
func (r *repeated) CloseSend() error { return nil }

// Receive implements connect.ClientStream. It returns the error of the last attempt.
func (r *repeated) Receive(message any) error {
	r.mu.Lock()
	request, received := r.request, r.received
	r.received = true
	r.mu.Unlock()
	if received {
		return io.EOF
	}
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval, pause.Multiplier = cmp.Or(r.config.RetryBase, 100*time.Millisecond), 2
	pause.RandomizationFactor, pause.MaxInterval = 0.5, 2*time.Second
	var last error
	_, _ = backoff.Retry(r.ctx, func() (struct{}, error) { // last is more useful than what Retry returns
		last = r.attempt(request, message)
		if last != nil && connect.CodeOf(last) != connect.CodeUnavailable {
			return struct{}{}, backoff.Permanent(last)
		}
		return struct{}{}, last
	}, backoff.WithBackOff(pause), backoff.WithMaxTries(uint(r.attempts)), backoff.WithMaxElapsedTime(0))
	return last
}

func (r *repeated) attempt(request, response any) (err error) {
	info, _ := connect.CallInfoForClientContext(r.ctx)
	for _, header := range []*connect.Header{info.ResponseHeader(), info.ResponseTrailer()} {
		*header = connect.Header{} // without those of the attempt before
	}
	stream, err := r.next(r.ctx, r.spec)
	if err != nil {
		return err
	}
	defer func() {
		if closed := stream.Close(); err == nil {
			err = closed
		}
	}()
	if err := stream.Send(request); err != nil && !errors.Is(err, io.EOF) { // EOF: Receive returns the reason
		return err
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	return stream.Receive(response)
}

// Close implements connect.ClientStream.
func (r *repeated) Close() error {
	r.cancel()
	return nil
}
