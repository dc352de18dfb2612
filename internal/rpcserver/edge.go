package rpcserver

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"

	connectcors "connectrpc.com/cors"
	"example.com/shop/internal/auth"
	"github.com/rs/cors"
)

// newEdge puts around all of HTTP what browsers need, what protects them, and an ID for each request. A panic here is one outside of any RPC.
func newEdge(next http.Handler, config Config) http.Handler {
	next = allowOrigins(next, config)
	if config.LocalNames {
		next = localNames(next, config.Hosts)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := requestID(r.Header.Get(requestIDHeader))
		r.Header.Set(requestIDHeader, id)
		w.Header().Set(requestIDHeader, id)
		protect(w.Header(), config.TLS != nil)
		defer func() {
			p := recover()
			if p == nil {
				return
			}
			if p == http.ErrAbortHandler { // net/http's own way to break off
				panic(p)
			}
			config.Log.LogAttrs(r.Context(), slog.LevelError, "request panicked", slog.String("path", r.URL.Path),
				slog.String("panic", fmt.Sprint(p)), slog.String("stack", string(debug.Stack())), slog.String("request_id", id))
			http.Error(w, "internal error", http.StatusInternalServerError) // without effect if the answer has begun
		}()
		next.ServeHTTP(w, r)
	})
}

// protect sets what suits an API; a handler that serves pages replaces it.
func protect(header http.Header, encrypted bool) {
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Cache-Control", "no-store") // answers to GET, too, are for their caller alone
	header.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
	header.Set("Referrer-Policy", "no-referrer")
	header.Set("Cross-Origin-Resource-Policy", "same-origin")
	if encrypted {
		header.Set("Strict-Transport-Security", "max-age=31536000")
	}
}

// allowOrigins lets pages of the given origins call, and no others. Credentials travel in headers that a page of another origin cannot set, but
// client certificates do not, and with authentication off there is nothing to set: so what a page of another origin sends is refused, and not
// only its answer withheld.
func allowOrigins(next http.Handler, config Config) http.Handler {
	origins := config.Origins
	protection := http.NewCrossOriginProtection()
	for _, origin := range origins {
		if err := protection.AddTrustedOrigin(origin); err != nil {
			panic("rpcserver: " + err.Error())
		}
	}
	next = protection.Handler(next)
	if len(origins) == 0 { // rs/cors takes none for all
		return next
	}
	request, response := Headers()
	return cors.New(cors.Options{
		AllowedOrigins: origins,
		AllowedMethods: connectcors.AllowedMethods(),
		AllowedHeaders: slices.Concat(connectcors.AllowedHeaders(), request, config.RequestHeaders),
		ExposedHeaders: slices.Concat(connectcors.ExposedHeaders(), response, config.ResponseHeaders),
		MaxAge:         7200, // seconds; Chrome's limit
	}).Handler(next)
}

// Headers returns the headers that the interceptors of this package and of auth read of requests and write to answers.
func Headers() (request, response []string) {
	request, response = auth.Headers()
	return slices.Concat(request, []string{requestIDHeader}, traceHeaders.Fields()), append(response, requestIDHeader, retryAfterHeader)
}

// localNames lets through what names this machine, or one of the hosts.
func localNames(next http.Handler, hosts []string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			host = r.Host
		}
		if address := net.ParseIP(strings.Trim(host, "[]")); host != "localhost" && !address.IsLoopback() && !slices.Contains(hosts, host) {
			http.Error(w, "with authentication off this is served under local names only: see INSECURE_NO_AUTH_HOSTS", http.StatusMisdirectedRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// CheckOrigin says whether origin is one that Config.Origins takes: a scheme, a host, perhaps a port, and nothing else.
func CheckOrigin(origin string) error {
	return http.NewCrossOriginProtection().AddTrustedOrigin(origin)
}
