package rpcserver

import (
	"context"
	"net/http"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/orders/internal/bounds"
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
	if g.types[pattern]&connect.StreamTypeClient == 0 {
		handler = g.boundBody(handler)
	}
	if g.types[pattern] != connect.StreamTypeUnary {
		handler = endOnDrain(nameNoEmptyEncoding(handler))
	}
	g.mux.Handle(pattern, cutQuoted(handler))
}

// quoted are the headers and query parameters that Connect quotes in the error when it cannot use their value.
var (
	quotedHeaders = []string{
		"Connect-Content-Encoding", "Connect-Protocol-Version", "Connect-Timeout-Ms", "Content-Encoding",
		"Grpc-Encoding", "Grpc-Timeout",
	}
	quotedParameters = []string{"base64", "compression", "connect", "encoding"}
)

const (
	// maxQuoted is the most bytes of such a value that an error quotes. No valid one is as long.
	maxQuoted = 64
	// maxProcedure is the same for the name of a procedure.
	maxProcedure = 255
)

// cutQuoted cuts the values that an error would quote. What is cut was not usable before.
func cutQuoted(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, name := range quotedHeaders {
			if value := r.Header.Get(name); len(value) > maxQuoted {
				r.Header.Set(name, bounds.Text(value, maxQuoted))
			}
		}
		r.URL.Path = bounds.Text(r.URL.Path, maxProcedure)
		if r.Method == http.MethodGet {
			query, long := r.URL.Query(), false
			for _, name := range quotedParameters {
				if value := query.Get(name); len(value) > maxQuoted {
					query.Set(name, bounds.Text(value, maxQuoted))
					long = true
				}
			}
			if long {
				r.URL.RawQuery = query.Encode()
			}
		}
		next.ServeHTTP(w, r)
	})
}

// boundBody bounds the body of a call with one request message in size and time. Connect bounds the message by itself, but
// would read what is too large to its end, and wait for it however long.
func (g *guard) boundBody(next http.Handler) http.Handler {
	const framing = 1 << 10 // room for the envelope, so that it is Connect that refuses what is a little too large
	limit := int64(g.config.ReadMaxBytes) + framing
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// A body that is there already must get no deadline: net/http reads on, to notice when the caller leaves. Otherwise it
		// lifts the deadline by itself when the body is at its end.
		if r.Body != http.NoBody {
			_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(g.config.BodyTimeout)) // httptest.ResponseRecorder has none
			r.Body = http.MaxBytesReader(w, r.Body, limit)
		}
		next.ServeHTTP(w, r)
	})
}

// nameNoEmptyEncoding covers a fault of Connect's: to a stream whose compression it does not know it answers with an empty
// Connect-Content-Encoding, at which clients stop and never see the error behind it.
func nameNoEmptyEncoding(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Header.Get(streamEncodingHeader) {
		case "", "identity", "gzip":
		default:
			w = namedEncoding{w}
		}
		next.ServeHTTP(w, r)
	})
}

const streamEncodingHeader = "Connect-Content-Encoding"

// namedEncoding is an answer without the header, if that is empty.
type namedEncoding struct{ http.ResponseWriter }

func (n namedEncoding) mend() {
	if n.Header().Get(streamEncodingHeader) == "" {
		n.Header().Del(streamEncodingHeader)
	}
}

func (n namedEncoding) WriteHeader(status int) {
	n.mend()
	n.ResponseWriter.WriteHeader(status)
}

func (n namedEncoding) Write(p []byte) (int, error) {
	n.mend()
	return n.ResponseWriter.Write(p)
}

// Flush implements http.Flusher, which Connect asks for.
func (n namedEncoding) Flush() {
	n.mend()
	_ = http.NewResponseController(n.ResponseWriter).Flush() // a failure shows at the next write
}

// Unwrap lets http.ResponseController reach what is beneath.
func (n namedEncoding) Unwrap() http.ResponseWriter { return n.ResponseWriter }

// endOnDrain ends a stream when the server begins to drain: its context, for handlers that wait for something to send, and
// its body, for those that wait for the caller.
func endOnDrain(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		draining, ok := r.Context().Value(drainingKey{}).(context.Context)
		if !ok { // not served by Serve
			next.ServeHTTP(w, r)
			return
		}
		ctx, cancel := context.WithCancelCause(r.Context())
		defer cancel(nil)
		control := http.NewResponseController(w)
		ended := make(chan struct{})
		stop := context.AfterFunc(draining, func() {
			defer close(ended)
			cancel(errDraining)
			_ = control.SetReadDeadline(time.Now())
		})
		defer func() {
			if !stop() {
				<-ended // w must not be used once ServeHTTP has returned
			}
		}()
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}
