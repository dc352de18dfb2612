// Package auth authenticates callers and authorizes their calls.
//
// It guarantees three things. A procedure is closed to everybody unless its proto file, or a list in this package,
// declares its access. A credential that is sent must be valid, even if the procedure needs none. API keys are stored
// as hashes and compared in constant time. The package does not authorize access to objects: the handler decides with
// FromContext which objects a caller may see.
//
// The interceptors work over any transport that fills in the request headers of connect.CallInfo.
package auth

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
)

// Caller is an authenticated caller.
type Caller struct {
	// Subject is the name, unique among the callers of one kind: a token's "sub", an API key's ID, or a client
	// certificate's name. Identify sets only names of 1 to 256 bytes of printable UTF-8, so that Postgres, logs and
	// headers can take them.
	Subject string
	// Roles are compared with the roles in auth.v1.Access.
	Roles []string
	// By is the kind of credential: "jwt", "apikey", "mtls", "nothing" when authentication is off, or "service" for calls
	// of the service itself.
	By string
	// Expires is when the credential expires, which also ends a stream. Zero means never.
	Expires time.Time
}

// visitor is the caller of one call, or the error that denied the credentials.
type visitor struct {
	Caller
	denied error
}

type visitorKey struct{}

// Visit makes room in ctx for the caller of one call. Code that runs outside of authentication, such as the access
// log, can then read the caller after the call.
func Visit(ctx context.Context) context.Context {
	if _, ok := ctx.Value(visitorKey{}).(*visitor); ok {
		return ctx
	}
	return context.WithValue(ctx, visitorKey{}, new(visitor))
}

// As returns a context with a caller that was authenticated earlier, for calls that do not come from a client. The code
// that calls As must be sure of the caller's identity. Authorize treats the caller like any other.
func As(ctx context.Context, caller Caller) context.Context {
	v := &visitor{Caller: caller}
	if caller.By == "" {
		v.denied = errNone
	}
	return context.WithValue(ctx, visitorKey{}, v)
}

// FromContext returns the caller; ok is false if there were no credentials.
func FromContext(ctx context.Context) (caller Caller, ok bool) {
	v, _ := ctx.Value(visitorKey{}).(*visitor)
	if v == nil || v.By == "" {
		return Caller{}, false
	}
	return v.Caller, true
}

// Config sets which credentials are accepted. The zero Config accepts none.
type Config struct {
	// Tokens are accepted as "authorization: Bearer"; nil accepts none.
	Tokens *Tokens
	// Keys are accepted as "x-api-key"; nil accepts none.
	Keys *Keys
	// Certificates accepts client certificates that the server has verified.
	Certificates bool
	// Off turns authentication and authorization off. For development only.
	Off bool
}

const (
	bearerHeader    = "Authorization"
	keyHeader       = "X-Api-Key"
	challengeHeader = "WWW-Authenticate"
)

// Headers returns the headers that Identify reads from requests and writes to responses.
func Headers() (request, response []string) {
	return []string{bearerHeader, keyHeader}, []string{challengeHeader}
}

// challenges returns the accepted authentication schemes (RFC 9110, section 11.6.1), in the order in which clients
// should try them. API keys and client certificates have no registered scheme. ApiKey is a common name for the
// former.
func (c Config) challenges() (all []string) {
	if c.Tokens != nil {
		all = append(all, "Bearer")
	}
	if c.Keys != nil {
		all = append(all, `ApiKey header="`+keyHeader+`"`)
	}
	if c.Certificates {
		all = append(all, "ClientCertificate")
	}
	return all
}

// challenge adds the accepted schemes to the response headers if err is unauthenticated.
func challenge(info *connect.CallInfo, challenges []string, err error) {
	if err == nil || connect.CodeOf(err) != connect.CodeUnauthenticated {
		return
	}
	for _, scheme := range challenges {
		info.ResponseHeader().Add(challengeHeader, scheme)
	}
}

// errNone means that a call came without credentials.
var errNone = connect.NewError(connect.CodeUnauthenticated,
	"credentials are missing: send authorization: Bearer, x-api-key or a client certificate")

// errInvalid answers every invalid credential. It gives the caller no reason.
var errInvalid = connect.NewError(connect.CodeUnauthenticated, "credentials are invalid or have expired")

// errUnfitName gives the caller the same message. Only the log has the reason.
var errUnfitName = errInvalid.WithCause(
	fmt.Errorf("caller's name is not 1 to %d bytes of printable UTF-8", maxName))

// maxName is the longest name of a caller in bytes.
const maxName = 256

// fitName reports whether a caller's name is safe wherever it is used. Postgres stores neither NUL nor invalid UTF-8.
// Control and format characters could forge log lines and the names that the audit log shows. Decoders replace invalid
// bytes with U+FFFD, so two callers could share a name that contains it.
func fitName(name string) bool {
	if name == "" || len(name) > maxName || !utf8.ValidString(name) {
		return false
	}
	return !strings.ContainsFunc(name, func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) })
}

// Identify returns an interceptor that authenticates callers. It rejects no call: the rate limit must be able to charge
// unauthenticated calls, too. Authorize must follow, and rejects them.
//
// Identify adds the accepted schemes to unauthenticated responses, in WWW-Authenticate.
func Identify(config Config) connect.ServerInterceptor {
	challenges := config.challenges()
	return func(next connect.ServerFunc) connect.ServerFunc {
		return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
			ctx = Visit(ctx)
			v := ctx.Value(visitorKey{}).(*visitor)
			info, _ := connect.CallInfoForServerContext(ctx)
			v.Caller, v.denied = config.identify(ctx, info)
			if v.denied == nil && !fitName(v.Subject) {
				v.Caller, v.denied = Caller{}, errUnfitName
			}
			if v.denied != nil || v.Expires.IsZero() {
				err := next(ctx, spec, stream)
				challenge(info, challenges, err)
				return err
			}
			live, cancel := context.WithDeadlineCause(ctx, v.Expires, errInvalid)
			defer cancel()
			err := next(live, spec, stream)
			if err != nil && errors.Is(context.Cause(live), errInvalid) {
				return errInvalid.WithCause(err) // the credential expired during a stream
			}
			return err
		}
	}
}

func (c Config) identify(ctx context.Context, info *connect.CallInfo) (Caller, error) {
	if c.Off {
		return Caller{Subject: "development", By: "nothing"}, nil
	}
	bearer, keys := info.RequestHeader().Values(bearerHeader), info.RequestHeader().Values(keyHeader)
	switch {
	case len(bearer)+len(keys) > 1:
		return Caller{}, connect.NewError(connect.CodeUnauthenticated, "more than one credential was sent")
	case len(keys) == 1:
		return c.Keys.verify(keys[0])
	case len(bearer) == 1:
		scheme, token, _ := strings.Cut(bearer[0], " ")
		if !strings.EqualFold(scheme, "bearer") {
			return Caller{}, errInvalid
		}
		return c.Tokens.verify(ctx, token)
	}
	if certificate := clientCertificate(info); c.Certificates && certificate != nil {
		return fromCertificate(certificate), nil
	}
	return Caller{}, errNone
}

// clientCertificate returns the client certificate that the TLS handshake verified, or nil.
func clientCertificate(info *connect.CallInfo) *x509.Certificate {
	http, ok := info.TransportInfo.(*connecthttp.ServerInfo)
	if !ok || http.TLS() == nil || len(http.TLS().VerifiedChains) == 0 {
		return nil
	}
	return http.TLS().VerifiedChains[0][0]
}

// fromCertificate takes the name from a SPIFFE ID, or else from the common name, and the roles from the
// organizations, as Kubernetes does. Anyone who can get a certificate signed can therefore choose its roles, so the
// certificate authority must be the service's own.
func fromCertificate(certificate *x509.Certificate) Caller {
	caller := Caller{
		Subject: certificate.Subject.CommonName,
		Roles:   certificate.Subject.Organization,
		By:      "mtls",
		Expires: certificate.NotAfter,
	}
	for _, uri := range certificate.URIs {
		if uri.Scheme == "spiffe" {
			caller.Subject = uri.String()
		}
	}
	return caller
}
