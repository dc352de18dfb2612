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

// newEdge wraps the HTTP handler. It adds CORS, headers that protect browsers, and an ID for each request. It
// recovers from panics outside of RPCs.
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
			if p == http.ErrAbortHandler { // aborts the response; net/http handles it
				panic(p)
			}
			config.Log.LogAttrs(r.Context(), slog.LevelError, "request panicked",
				slog.String("path", r.URL.Path), slog.String("panic", fmt.Sprint(p)),
				slog.String("stack", string(debug.Stack())), slog.String("request_id", id))
			http.Error(w, "internal error", http.StatusInternalServerError) // no effect if the response has begun
		}()
		next.ServeHTTP(w, r)
	})
}

// protect sets security headers for an API. A handler that serves pages replaces them.
func protect(header http.Header, encrypted bool) {
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Cache-Control", "no-store") // even the response to a GET is only for its caller
	header.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
	header.Set("Referrer-Policy", "no-referrer")
	header.Set("Cross-Origin-Resource-Policy", "same-origin")
	if encrypted {
		header.Set("Strict-Transport-Security", "max-age=31536000")
	}
}

// allowOrigins admits calls of pages of the given origins only. Most credentials are in headers that a page of another
// origin cannot set. But browsers send client certificates automatically, and with authentication off there are no
// credentials. So allowOrigins refuses the requests of other origins, instead of only withholding the responses.
func allowOrigins(next http.Handler, config Config) http.Handler {
	origins := config.Origins
	protection := http.NewCrossOriginProtection()
	for _, origin := range origins {
		if err := protection.AddTrustedOrigin(origin); err != nil {
			panic("rpcserver: " + err.Error())
		}
	}
	next = protection.Handler(next)
	if len(origins) == 0 { // for rs/cors, no origins would mean all
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

// Headers returns the headers that the interceptors of this package and of auth read from requests and write to
// responses.
func Headers() (request, response []string) {
	request, response = auth.Headers()
	request = slices.Concat(request, []string{requestIDHeader}, traceHeaders.Fields())
	return request, append(response, requestIDHeader, retryAfterHeader)
}

// localNames admits requests whose host is this machine or one of hosts.
func localNames(next http.Handler, hosts []string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			host = r.Host
		}
		address := net.ParseIP(strings.Trim(host, "[]"))
		if host != "localhost" && !address.IsLoopback() && !slices.Contains(hosts, host) {
			http.Error(w, "with authentication off, only local host names are accepted: see INSECURE_NO_AUTH_HOSTS",
				http.StatusMisdirectedRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// CheckOrigin returns an error if Config.Origins cannot contain origin. An origin is a scheme, a host and an optional
// port.
func CheckOrigin(origin string) error {
	return http.NewCrossOriginProtection().AddTrustedOrigin(origin)
}
