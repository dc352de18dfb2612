// Package auth says who calls and whether they may.
//
// It guarantees that a procedure is denied to everybody unless its proto file, or a list in this package, says who may call it; that a
// credential which is given must be valid, also where none is needed; and that keys of callers are compared in constant time and kept
// as hashes. It knows nothing of objects: whether a caller may see this order is for the handler to decide, with FromContext.
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

// Caller is somebody whose credentials were valid.
type Caller struct {
	// Subject is the name, unique among the callers of one kind: a token's "sub", an API key's ID, a client certificate's name.
	// Identify sets names of 1 to 256 bytes of printable UTF-8 only, so that Postgres, logs and headers can take them.
	Subject string
	// Roles are what auth.v1.Access asks for.
	Roles []string
	// By says how the caller is known: "jwt", "apikey", "mtls", or "nothing" when authentication is off.
	By string
	// Expires is when the credential ends and, with it, a stream; zero is never.
	Expires time.Time
}

// visitor is the caller of one call, or the reason why there is none.
type visitor struct {
	Caller
	denied error
}

type visitorKey struct{}

// Visit makes room in ctx for the caller of one call, so that what surrounds authentication, such as the access log, can see it afterwards.
func Visit(ctx context.Context) context.Context {
	if _, ok := ctx.Value(visitorKey{}).(*visitor); ok {
		return ctx
	}
	return context.WithValue(ctx, visitorKey{}, new(visitor))
}

// As returns a context in which the caller is known to be somebody, for calls that do not come from a client: it was identified before, and whoever
// says so must be sure of it. Authorize judges it as any other.
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

// Config says which credentials are accepted: of none of them, none.
type Config struct {
	// Tokens are accepted as "authorization: Bearer"; nil accepts none.
	Tokens *Tokens
	// Keys are accepted as "x-api-key"; nil accepts none.
	Keys *Keys
	// Certificates accepts the client certificates that the server verified.
	Certificates bool
	// Off lets everybody do everything. For development only.
	Off bool
}

const (
	bearerHeader    = "Authorization"
	keyHeader       = "X-Api-Key"
	challengeHeader = "WWW-Authenticate"
)

// Headers returns the headers that Identify reads of requests and writes to answers.
func Headers() (request, response []string) {
	return []string{bearerHeader, keyHeader}, []string{challengeHeader}
}

// challenges are the ways to authenticate (RFC 9110, section 11.6.1), in the order in which clients should try them. API keys and client certificates
// have no registered scheme; ApiKey is what others call the former.
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

// challenge says with an answer that lacks credentials which ones are accepted.
func challenge(info *connect.CallInfo, challenges []string, err error) {
	if err == nil || connect.CodeOf(err) != connect.CodeUnauthenticated {
		return
	}
	for _, one := range challenges {
		info.ResponseHeader().Add(challengeHeader, one)
	}
}

// errNone means that a call came without credentials.
var errNone = connect.NewError(connect.CodeUnauthenticated, "credentials are missing: send authorization: Bearer, x-api-key or a client certificate")

// errInvalid is all that a caller hears of a wrong credential.
var errInvalid = connect.NewError(connect.CodeUnauthenticated, "credentials are invalid or have expired")

// errUnfitName says the same to the caller. The log says why.
var errUnfitName = errInvalid.WithCause(fmt.Errorf("the caller's name is not 1 to %d bytes of printable UTF-8", maxName))

// maxName is the longest name of a caller in bytes.
const maxName = 256

// fitName tells whether every place that a caller's name gets to can take it. Postgres stores neither NUL nor broken
// UTF-8. Control and format characters would forge log lines and the names that the audit log shows. Decoders put U+FFFD
// for what they cannot decode, so two callers could share a name that has it.
func fitName(name string) bool {
	if name == "" || len(name) > maxName || !utf8.ValidString(name) {
		return false
	}
	return !strings.ContainsFunc(name, func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) })
}

// Identify returns the interceptor that finds out who calls. It turns nobody away: what it finds is billed by a rate limit first,
// and then judged by Authorize, which must follow.
//
// An answer that is unauthenticated names the accepted schemes in WWW-Authenticate.
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
				return errInvalid.WithCause(err) // a stream outlived its credential
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

// clientCertificate returns the certificate that the TLS handshake verified, or nil.
func clientCertificate(info *connect.CallInfo) *x509.Certificate {
	http, ok := info.TransportInfo.(*connecthttp.ServerInfo)
	if !ok || http.TLS() == nil || len(http.TLS().VerifiedChains) == 0 {
		return nil
	}
	return http.TLS().VerifiedChains[0][0]
}

// fromCertificate takes the name from a SPIFFE ID, or else from the common name, and the roles from the organizations, as Kubernetes
// does. So whoever can have certificates signed decides on roles: the authority must be the service's own.
func fromCertificate(certificate *x509.Certificate) Caller {
	caller := Caller{
		Subject: certificate.Subject.CommonName, Roles: certificate.Subject.Organization, By: "mtls", Expires: certificate.NotAfter,
	}
	for _, uri := range certificate.URIs {
		if uri.Scheme == "spiffe" {
			caller.Subject = uri.String()
		}
	}
	return caller
}
