package auth

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/MicahParks/jwkset"
	"github.com/MicahParks/keyfunc/v3"
	"github.com/golang-jwt/jwt/v5"
)

const (
	// leeway is how far the issuer's clock may differ from ours.
	leeway = 30 * time.Second
	// maxToken is the longest token in bytes, more than any sane token needs. Longer ones are not parsed.
	maxToken = 8 << 10
	// maxLife is the longest lifetime of a token. Without a bound, a leaked token could stay valid forever.
	maxLife = 24 * time.Hour
	// minRSABits is the minimum that NIST has required since 2014.
	minRSABits = 2048
)

// TokenConfig sets which tokens are accepted.
type TokenConfig struct {
	// Issuer must equal "iss", and "aud" must contain Audience. Both are required: without them this service would accept
	// a token that the same authority issued for another service.
	Issuer, Audience string
	// RolesClaim is the claim with the caller's roles: a string or a list of strings. If no claim has this name, it is
	// the path to a nested claim, such as "realm_access.roles". Default "roles".
	RolesClaim string
}

// Tokens verifies JSON web tokens (RFC 7519). A token must be signed with EdDSA, RS256 or ES256 by a key of the key
// set, be issued for this audience, and not have expired. The token alone never chooses the algorithm: it must be one
// of the three, and each accepts only keys of its own type. So nobody can pass a public key off as an HMAC secret.
type Tokens struct {
	config TokenConfig
	keys   *KeySet
	parser *jwt.Parser
}

// NewTokens returns a verifier that uses the keys of the key set.
func NewTokens(config TokenConfig, keys *KeySet) (*Tokens, error) {
	if config.Issuer == "" || config.Audience == "" {
		return nil, errors.New("tokens require an issuer and an audience")
	}
	if config.RolesClaim == "" {
		config.RolesClaim = "roles"
	}
	return &Tokens{config: config, keys: keys, parser: jwt.NewParser(
		jwt.WithValidMethods([]string{"EdDSA", "RS256", "ES256"}),
		jwt.WithIssuer(config.Issuer), jwt.WithAudience(config.Audience),
		jwt.WithExpirationRequired(), jwt.WithIssuedAt(), jwt.WithLeeway(leeway),
	)}, nil
}

// errKeysAway answers tokens that may be valid, while no current keys are available.
var errKeysAway = connect.NewError(connect.CodeUnavailable, "tokens cannot be verified at the moment, try again")

func (t *Tokens) verify(ctx context.Context, token string) (Caller, error) {
	if t == nil || len(token) > maxToken {
		return Caller{}, errInvalid
	}
	keys, err := t.keys.current()
	if err != nil {
		return Caller{}, errKeysAway.WithCause(err)
	}
	claims := jwt.MapClaims{}
	parsed, err := t.parser.ParseWithClaims(token, claims, keys.KeyfuncCtx(ctx))
	if errors.Is(err, jwkset.ErrKeyNotFound) {
		t.keys.wake() // the issuer may have a new key
	}
	if err != nil {
		return Caller{}, errInvalid.WithCause(err)
	}
	if _, ok := parsed.Header["crit"]; ok {
		// The header lists extensions that a verifier must understand (RFC 7515, section 4.1.11). We support none.
		return Caller{}, errInvalid.WithCause(errors.New("token requires an extension: its header has crit"))
	}
	caller, err := t.caller(claims)
	if err != nil {
		return Caller{}, errInvalid.WithCause(err)
	}
	return caller, nil
}

func (t *Tokens) caller(claims jwt.MapClaims) (Caller, error) {
	subject, err := claims.GetSubject()
	if err != nil {
		return Caller{}, err
	}
	expires, err := claims.GetExpirationTime() // not nil: the parser requires it
	if err != nil {
		return Caller{}, err
	}
	if time.Until(expires.Time) > maxLife {
		return Caller{}, fmt.Errorf("token is valid for longer than %s", maxLife)
	}
	caller := Caller{Subject: subject, By: "jwt", Expires: expires.Add(leeway)}
	switch roles := lookup(claims, t.config.RolesClaim).(type) {
	case string:
		caller.Roles = []string{roles}
	case []any:
		for _, role := range roles {
			if name, ok := role.(string); ok {
				caller.Roles = append(caller.Roles, name)
			}
		}
	}
	return caller, nil
}

// lookup returns the claim of that name. If there is none, it reads the name as a path: the part before a dot names the
// object that contains the rest. Names may contain dots, so lookup tries each dot. It returns nil if it finds nothing.
func lookup(claims map[string]any, name string) any {
	if value, ok := claims[name]; ok {
		return value
	}
	for at, r := range name {
		if nested, ok := claims[name[:at]].(map[string]any); ok && r == '.' {
			if value := lookup(nested, name[at+1:]); value != nil {
				return value
			}
		}
	}
	return nil
}

// parseJWKS returns the usable public keys of a key set and skips the others: a key set may serve other purposes,
// too. It copies only the numbers of each key, so that it neither stores a private key nor follows a certificate's
// URL.
func parseJWKS(text []byte) (keyfunc.Keyfunc, error) {
	var set jwkset.JWKSMarshal
	if err := json.Unmarshal(text, &set); err != nil {
		return nil, errors.New("not a JSON web key set")
	}
	storage := jwkset.NewMemoryStorage()
	usable := 0
	for _, k := range set.Keys {
		public := jwkset.JWKMarshal{KTY: k.KTY, KID: k.KID, ALG: k.ALG, CRV: k.CRV, X: k.X, Y: k.Y, N: k.N, E: k.E}
		jwk, err := jwkset.NewJWKFromMarshal(public, jwkset.JWKMarshalOptions{}, jwkset.JWKValidateOptions{})
		if err != nil || !fit(jwk.Key()) || k.USE == jwkset.UseEnc {
			slog.Debug("skipped a key of the key set", "kid", k.KID, "kty", string(k.KTY))
			continue
		}
		if err := storage.KeyWrite(context.Background(), jwk); err != nil {
			return nil, err
		}
		usable++
	}
	if usable == 0 {
		return nil, errors.New("key set has no key for EdDSA, RS256 or ES256")
	}
	return keyfunc.New(keyfunc.Options{Storage: storage})
}

func fit(key any) bool {
	switch key := key.(type) {
	case ed25519.PublicKey:
		return true
	case *rsa.PublicKey:
		return key.N.BitLen() >= minRSABits
	case *ecdsa.PublicKey:
		return key.Curve == elliptic.P256()
	}
	return false
}
