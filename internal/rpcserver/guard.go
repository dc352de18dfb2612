package rpcserver

import (
	"context"
	"io"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
)

// guard is the mux that Connect mounts its handlers on. It wraps each handler with the limits that its kind of call
// needs and that only HTTP can enforce.
type guard struct {
	mux    *http.ServeMux
	config Config
	types  map[string]connect.StreamType
}

func newGuard(mux *http.ServeMux, config Config, rpc *connect.Server) *guard {
	types := make(map[string]connect.StreamType)
	for spec := range rpc.Specs() {
		types[spec.Procedure] = spec.StreamType
	}
	return &guard{mux: mux, config: config, types: types}
}

// Handle implements connecthttp.ServeMux. A pattern that is not a procedure matches the unknown methods of a service,
// which count as unary.
func (g *guard) Handle(pattern string, handler http.Handler) {
	if g.config.Budget != nil {
		handler = meter(handler, g.config.Budget)
	}
	if g.types[pattern]&connect.StreamTypeClient == 0 {
		handler = g.boundBody(handler)
	}
	if g.types[pattern] != connect.StreamTypeUnary {
		handler = endOnDrain(dropEmptyEncoding(handler))
	}
	g.mux.Handle(pattern, cutQuoted(handler))
}

// meter charges each request for its body while it arrives, and for its message until the call ends.
func meter(next http.Handler, budget *Budget) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		load := newLoad(budget)
		defer load.release()
		r = r.WithContext(context.WithValue(r.Context(), loadKey{}, load))
		r.Body = &meteredBody{r.Body, load}
		next.ServeHTTP(w, r)
	})
}

// boundBody bounds the size and the time of a body with one request message, and ends the body when the server begins
// to drain. Connect bounds the message, too, but reads a message that is too large to its end, and waits for it
// without a limit.
func (g *guard) boundBody(next http.Handler) http.Handler {
	// Room for the envelope, so that Connect itself refuses a message that is slightly too large.
	const framing = 1 << 10
	limit := int64(g.config.ReadMaxBytes) + framing
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// A request without a body must not get a deadline, because net/http keeps reading to notice when the caller leaves.
		// Otherwise, net/http removes the deadline at the end of the body.
		if r.Body != http.NoBody {
			control := http.NewResponseController(w)
			_ = control.SetReadDeadline(time.Now().Add(g.config.BodyTimeout)) // httptest.ResponseRecorder has none
			body := &arriving{ReadCloser: http.MaxBytesReader(w, r.Body, limit)}
			r.Body = body
			defer onDrain(r.Context(), func() { body.end(control) })()
		}
		next.ServeHTTP(w, r)
	})
}

// arriving is a body that records whether it was read to its end.
type arriving struct {
	io.ReadCloser
	mu      sync.Mutex
	arrived bool
}

func (a *arriving) Read(p []byte) (int, error) {
	n, err := a.ReadCloser.Read(p)
	if err != nil {
		a.mu.Lock()
		a.arrived = true
		a.mu.Unlock()
	}
	return n, err
}

// end stops the handler from waiting for the rest of the body. If the body has arrived, end does nothing, so that its
// call continues.
func (a *arriving) end(control *http.ResponseController) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.arrived {
		_ = control.SetReadDeadline(time.Now())
	}
}

// onDrain calls fn when the server that serves ctx begins to drain, unless stop was called before. After stop has
// returned, fn does not run. A handler must call stop, because fn must not use the response after the handler has
// returned.
func onDrain(ctx context.Context, fn func()) (stop func()) {
	draining, ok := ctx.Value(drainingKey{}).(context.Context)
	if !ok { // not served by Serve
		return func() {}
	}
	ended := make(chan struct{})
	forget := context.AfterFunc(draining, func() {
		defer close(ended)
		fn()
	})
	return func() {
		if !forget() {
			<-ended
		}
	}
}

// endOnDrain ends a stream when the server begins to drain. It cancels the context for handlers that wait for
// something to send, and ends the body for handlers that wait for the caller.
func endOnDrain(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithCancelCause(r.Context())
		defer cancel(nil)
		control := http.NewResponseController(w)
		defer onDrain(ctx, func() {
			cancel(errDraining)
			_ = control.SetReadDeadline(time.Now())
		})()
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}
