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
	// maxToken is more than any sane token has. Parsing more would be work for nothing.
	maxToken = 8 << 10
	// maxLife is the longest lifetime of a token: without a bound, one that leaked opens the door for ever.
	maxLife = 24 * time.Hour
	// minRSABits is what NIST asks for since 2014.
	minRSABits = 2048
)

// TokenConfig says which tokens are accepted.
type TokenConfig struct {
	// Issuer and Audience are what "iss" must be and "aud" must contain. Both are required: without them a token that the same
	// authority made for another service would open this one.
	Issuer, Audience string
	// RolesClaim is the claim that lists the caller's roles, a string or several. It is the name of a claim, or if there is
	// none of that name a path to a nested one, such as "realm_access.roles". Default "roles".
	RolesClaim string
}

// Tokens verifies JSON web tokens (RFC 7519): signed by EdDSA, RS256 or ES256 with a key of the key set, for this audience, and not expired.
// The algorithm is never taken from the token alone. It must be one of the three, and each of them takes keys of its own type only, so that
// a public key cannot be passed off as an HMAC secret.
type Tokens struct {
	config TokenConfig
	keys   *KeySet
	parser *jwt.Parser
}

// NewTokens makes a verifier that takes its keys from the key set.
func NewTokens(config TokenConfig, keys *KeySet) (*Tokens, error) {
	if config.Issuer == "" || config.Audience == "" {
		return nil, errors.New("tokens need an issuer and an audience")
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

// errKeysAway is for callers whose token may well be good.
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
		// The header names extensions without which a token means something else (RFC 7515, section 4.1.11). We know none.
		return Caller{}, errInvalid.WithCause(errors.New("token needs an extension: its header has crit"))
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
	expires, err := claims.GetExpirationTime() // there, or the parser would have refused it
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

// lookup returns the claim of that name. If there is none, the name is a path: what comes before a dot names the object
// that holds the rest. Names may have dots themselves, so each dot is tried. It returns nil if nothing is found.
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

// parseJWKS takes the public keys that can be used here and leaves out the others: a key set may serve other purposes, too. Of each key
// it takes the numbers only, so that neither a private key is kept nor a certificate's URL followed.
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
			slog.Debug("left out a key of the key set", "kid", k.KID, "kty", string(k.KTY))
			continue
		}
		if err := storage.KeyWrite(context.Background(), jwk); err != nil {
			return nil, err
		}
		usable++
	}
	if usable == 0 {
		return nil, errors.New("no key for EdDSA, RS256 or ES256 in the key set")
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
