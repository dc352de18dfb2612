package rpcserver

import (
	"net/http"

	"example.com/shop/internal/bounds"
)

// Connect quotes the values of these headers and query parameters in an error if it cannot use them.
var (
	quotedHeaders = []string{
		"Connect-Content-Encoding", "Connect-Protocol-Version", "Connect-Timeout-Ms", "Content-Encoding",
		"Grpc-Encoding", "Grpc-Timeout",
	}
	quotedParameters = []string{"base64", "compression", "connect", "encoding"}
)

const (
	// maxQuoted is the longest such value in bytes. No valid value is as long.
	maxQuoted = 64
	// maxProcedure is the same for the name of a procedure.
	maxProcedure = 255
)

// cutQuoted cuts long values that an error would quote. Values of that length are invalid anyway.
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

// dropEmptyEncoding works around a bug in Connect. If Connect does not support the compression of a stream, it
// answers with an empty Connect-Content-Encoding. Clients reject that header and never see the error.
func dropEmptyEncoding(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Header.Get(streamEncodingHeader) {
		case "", "identity", "gzip":
		default:
			w = encodingFixer{w}
		}
		next.ServeHTTP(w, r)
	})
}

const streamEncodingHeader = "Connect-Content-Encoding"

// encodingFixer removes the header from a response if it is empty.
type encodingFixer struct{ http.ResponseWriter }

func (f encodingFixer) fix() {
	if f.Header().Get(streamEncodingHeader) == "" {
		f.Header().Del(streamEncodingHeader)
	}
}

func (f encodingFixer) WriteHeader(status int) {
	f.fix()
	f.ResponseWriter.WriteHeader(status)
}

func (f encodingFixer) Write(p []byte) (int, error) {
	f.fix()
	return f.ResponseWriter.Write(p)
}

// Flush implements http.Flusher, which Connect requires.
func (f encodingFixer) Flush() {
	f.fix()
	_ = http.NewResponseController(f.ResponseWriter).Flush() // an error recurs at the next write
}

// Unwrap implements the interface that http.ResponseController uses.
func (f encodingFixer) Unwrap() http.ResponseWriter { return f.ResponseWriter }
