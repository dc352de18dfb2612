package rpcserver

import (
	"context"
	"io"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
)

// guard is the mux that Connect mounts its handlers on. It puts around each of them what the kind of call needs, which
// only HTTP can do.
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

// Handle implements connecthttp.ServeMux. A pattern that is no procedure is a service's unknown methods: unary, as it were.
func (g *guard) Handle(pattern string, handler http.Handler) {
	if g.config.Budget != nil {
		handler = meter(handler, g.config.Budget)
	}
	if g.types[pattern]&connect.StreamTypeClient == 0 {
		handler = g.boundBody(handler)
	}
	if g.types[pattern] != connect.StreamTypeUnary {
		handler = endOnDrain(nameNoEmptyEncoding(handler))
	}
	g.mux.Handle(pattern, cutQuoted(handler))
}

// meter has each request pay for its body while it arrives, and for its message until the call ends.
func meter(next http.Handler, budget *Budget) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		load := newLoad(budget)
		defer load.release()
		r = r.WithContext(context.WithValue(r.Context(), loadKey{}, load))
		r.Body = &meteredBody{r.Body, load}
		next.ServeHTTP(w, r)
	})
}

// boundBody bounds the body of a call with one request message in size and time, and ends it when the server begins to drain. Connect bounds
// the message by itself, but would read what is too large to its end, and wait for it however long.
func (g *guard) boundBody(next http.Handler) http.Handler {
	const framing = 1 << 10 // room for the envelope, so that it is Connect that refuses what is a little too large
	limit := int64(g.config.ReadMaxBytes) + framing
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// A body that is there already must get no deadline: net/http reads on, to notice when the caller leaves. Otherwise it
		// lifts the deadline by itself when the body is at its end.
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

// arriving is a body that knows whether it is here.
type arriving struct {
	io.ReadCloser
	mu   sync.Mutex
	here bool
}

func (a *arriving) Read(p []byte) (int, error) {
	n, err := a.ReadCloser.Read(p)
	if err != nil {
		a.mu.Lock()
		a.here = true
		a.mu.Unlock()
	}
	return n, err
}

// end makes the handler stop waiting for what has not arrived. A body that is here is left alone: its call goes on.
func (a *arriving) end(control *http.ResponseController) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.here {
		_ = control.SetReadDeadline(time.Now())
	}
}

// onDrain calls fn when the server that serves ctx begins to drain, unless stop was called before. Once stop has returned, fn is not running: a
// handler must call it, because a response must not be used once the handler has returned.
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

// endOnDrain ends a stream when the server begins to drain: its context, for handlers that wait for something to send, and
// its body, for those that wait for the caller.
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
