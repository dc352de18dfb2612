package rpcserver

import (
	"net/http"

	"example.com/shop/internal/bounds"
)

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

// cutQuoted cuts the values that an error would quote. Values of that length were unusable anyway.
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
