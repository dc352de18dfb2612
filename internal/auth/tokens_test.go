package auth

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/MicahParks/jwkset"
	"github.com/golang-jwt/jwt/v5"
)

// issuer has one key of each kind.
type issuer struct {
	ed    ed25519.PrivateKey
	rsa   *rsa.PrivateKey
	ec    *ecdsa.PrivateKey
	jwks  []byte
	claim jwt.MapClaims // of a valid token
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	i := &issuer{claim: jwt.MapClaims{
		"iss": "https://issuer.example", "aud": []string{"shop", "other"}, "sub": "ann", "roles": []string{"customer"},
		"exp": time.Now().Add(time.Hour).Unix(), "iat": time.Now().Unix(),
	}}
	var err error
	if _, i.ed, err = ed25519.GenerateKey(rand.Reader); err != nil {
		t.Fatal(err)
	}
	if i.rsa, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		t.Fatal(err)
	}
	if i.ec, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	i.jwks = keySetOf(t, map[string]crypto.PublicKey{"ed": i.ed.Public(), "rsa": i.rsa.Public(), "ec": i.ec.Public()})
	return i
}

func keySetOf(t *testing.T, keys map[string]crypto.PublicKey) []byte {
	t.Helper()
	storage := jwkset.NewMemoryStorage()
	for id, key := range keys {
		jwk, err := jwkset.NewJWKFromKey(key, jwkset.JWKOptions{Metadata: jwkset.JWKMetadataOptions{KID: id}})
		if err != nil {
			t.Fatal(err)
		}
		if err := storage.KeyWrite(t.Context(), jwk); err != nil {
			t.Fatal(err)
		}
	}
	set, err := storage.JSONPublic(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// sign returns a token with the valid claims and the given changes. A nil value removes a claim.
func (i *issuer) sign(t *testing.T, method jwt.SigningMethod, id string, key any, changes jwt.MapClaims) string {
	t.Helper()
	claims := jwt.MapClaims{}
	for _, from := range []jwt.MapClaims{i.claim, changes} {
		for name, value := range from {
			claims[name] = value
			if value == nil {
				delete(claims, name)
			}
		}
	}
	token := jwt.NewWithClaims(method, claims)
	if id != "" {
		token.Header["kid"] = id
	}
	signed, err := token.SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

func (i *issuer) tokens(t *testing.T) *Tokens {
	t.Helper()
	path := filepath.Join(t.TempDir(), "jwks.json")
	if err := os.WriteFile(path, i.jwks, 0o600); err != nil {
		t.Fatal(err)
	}
	return i.tokensFrom(t, path)
}

func (i *issuer) tokensFrom(t *testing.T, source string) *Tokens {
	t.Helper()
	return tokensWithRolesIn(t, "", source)
}

func tokensWithRolesIn(t *testing.T, claim, source string) *Tokens {
	t.Helper()
	keys, err := NewKeySet(source)
	if err != nil {
		t.Fatal(err)
	}
	tokens, err := NewTokens(TokenConfig{Issuer: "https://issuer.example", Audience: "shop", RolesClaim: claim}, keys)
	if err != nil {
		t.Fatal(err)
	}
	return tokens
}

func TestGoodTokens(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	tokens := i.tokens(t)
	with := func(changes jwt.MapClaims) string { return i.sign(t, jwt.SigningMethodEdDSA, "ed", i.ed, changes) }
	at := func(d time.Duration) int64 { return time.Now().Add(d).Unix() }
	for name, token := range map[string]string{
		"EdDSA":                with(nil),
		"RS256":                i.sign(t, jwt.SigningMethodRS256, "rsa", i.rsa, nil),
		"ES256":                i.sign(t, jwt.SigningMethodES256, "ec", i.ec, nil),
		"without a key ID":     i.sign(t, jwt.SigningMethodES256, "", i.ec, nil),
		"one audience":         with(jwt.MapClaims{"aud": "shop"}),
		"one role as a string": with(jwt.MapClaims{"roles": "customer"}),
		"clock ahead":          with(jwt.MapClaims{"iat": at(leeway / 2)}),
		"just expired":         with(jwt.MapClaims{"exp": at(-leeway / 2)}),
	} {
		caller, err := tokens.verify(t.Context(), token)
		if err != nil || caller.Subject != "ann" || !slices.Equal(caller.Roles, []string{"customer"}) ||
			caller.By != "jwt" {
			t.Errorf("%s: got %+v, %v", name, caller, err)
		}
		if !caller.Expires.After(time.Now()) {
			t.Errorf("%s: expired at %s already", name, caller.Expires)
		}
	}
}

func TestBadTokens(t *testing.T) {
	t.Parallel()
	i, stranger := newIssuer(t), newIssuer(t)
	tokens := i.tokens(t)
	rsaPublic, err := x509.MarshalPKIXPublicKey(i.rsa.Public())
	if err != nil {
		t.Fatal(err)
	}
	publicPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: rsaPublic})
	edPublic := i.ed.Public().(ed25519.PublicKey)
	with := func(changes jwt.MapClaims) string { return i.sign(t, jwt.SigningMethodEdDSA, "ed", i.ed, changes) }
	at := func(d time.Duration) int64 { return time.Now().Add(d).Unix() }
	good := with(nil)
	parts := strings.Split(good, ".")
	forged := encode(t, jwt.MapClaims{"iss": "https://issuer.example", "sub": "eve"})
	listKID := encode(t, map[string]any{"alg": "EdDSA", "kid": []string{"ed"}})
	for name, token := range map[string]string{
		"nothing":                    "",
		"no token":                   "hello",
		"alg none":                   i.sign(t, jwt.SigningMethodNone, "ed", jwt.UnsafeAllowNoneSignatureType, nil),
		"alg none without key ID":    i.sign(t, jwt.SigningMethodNone, "", jwt.UnsafeAllowNoneSignatureType, nil),
		"alg NONE":                   encode(t, map[string]any{"alg": "NONE", "typ": "JWT"}) + "." + parts[1] + ".",
		"HMAC with public RSA PEM":   i.sign(t, jwt.SigningMethodHS256, "rsa", publicPEM, nil),
		"HMAC with public RSA DER":   i.sign(t, jwt.SigningMethodHS256, "rsa", rsaPublic, nil),
		"HMAC with public Ed25519":   i.sign(t, jwt.SigningMethodHS256, "ed", []byte(edPublic), nil),
		"key of another type":        i.sign(t, jwt.SigningMethodES256, "rsa", i.ec, nil),
		"RS512":                      i.sign(t, jwt.SigningMethodRS512, "rsa", i.rsa, nil),
		"PS256":                      i.sign(t, jwt.SigningMethodPS256, "rsa", i.rsa, nil),
		"another issuer's key":       i.sign(t, jwt.SigningMethodEdDSA, "ed", stranger.ed, nil),
		"the same without key ID":    i.sign(t, jwt.SigningMethodEdDSA, "", stranger.ed, nil),
		"unknown key ID":             i.sign(t, jwt.SigningMethodEdDSA, "new", i.ed, nil),
		"key ID that is a path":      i.sign(t, jwt.SigningMethodEdDSA, "../../../../dev/null", i.ed, nil),
		"key in the token's header":  withKeyInHeader(t, stranger),
		"another issuer":             with(jwt.MapClaims{"iss": "https://other.example"}),
		"no issuer":                  with(jwt.MapClaims{"iss": nil}),
		"another audience":           with(jwt.MapClaims{"aud": "other"}),
		"no audience":                with(jwt.MapClaims{"aud": nil}),
		"expired":                    with(jwt.MapClaims{"exp": at(-leeway - 5*time.Second)}),
		"without expiry":             with(jwt.MapClaims{"exp": nil}),
		"expiry that is a string":    with(jwt.MapClaims{"exp": "tomorrow"}),
		"valid for a year":           with(jwt.MapClaims{"exp": at(365 * 24 * time.Hour)}),
		"not valid yet":              with(jwt.MapClaims{"nbf": at(time.Minute)}),
		"issued in the future":       with(jwt.MapClaims{"iat": at(time.Minute)}),
		"subject that is a list":     with(jwt.MapClaims{"sub": []string{"ann"}}),
		"crit":                       withHeader(t, i, "crit", []string{"exp"}),
		"empty crit":                 withHeader(t, i, "crit", []string{}),
		"crit that is null":          withHeader(t, i, "crit", nil),
		"subject of a megabyte":      with(jwt.MapClaims{"sub": strings.Repeat("a", 1<<20)}),
		"changed claims":             parts[0] + "." + forged + "." + parts[2],
		"cut signature":              good[:len(good)-8],
		"no signature":               parts[0] + "." + parts[1] + ".",
		"surrounded by blanks":       " " + good + " ",
		"a megabyte of dots":         strings.Repeat(".", 1<<20),
		"deeply nested header":       strings.Repeat("[", 4000) + "." + parts[1] + "." + parts[2],
		"claims that are an array":   parts[0] + "." + encode(t, []int{1}) + "." + parts[2],
		"header without alg":         encode(t, map[string]any{"kid": "ed"}) + "." + parts[1] + "." + parts[2],
		"header with a list for kid": listKID + "." + parts[1] + "." + parts[2],
	} {
		caller, err := tokens.verify(t.Context(), token)
		if connect.CodeOf(err) != connect.CodeUnauthenticated || caller.Subject != "" {
			t.Errorf("%s: got %+v, %v", name, caller, err)
		}
		var answer *connect.Error
		if errors.As(err, &answer) && answer.Message() != errInvalid.Message() {
			t.Errorf("%s: the error tells the caller the reason: %s", name, answer.Message())
		}
	}
}

// withHeader returns a token that is valid except for one header field.
func withHeader(t *testing.T, i *issuer, name string, value any) string {
	t.Helper()
	token := jwt.NewWithClaims(jwt.SigningMethodEdDSA, i.claim)
	token.Header["kid"], token.Header[name] = "ed", value
	signed, err := token.SignedString(i.ed)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

func TestRolesOfAClaim(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	path := filepath.Join(t.TempDir(), "jwks.json")
	if err := os.WriteFile(path, i.jwks, 0o600); err != nil {
		t.Fatal(err)
	}
	token := i.sign(t, jwt.SigningMethodEdDSA, "ed", i.ed, jwt.MapClaims{
		"https://example.com/roles": []string{"named"},
		"realm_access":              map[string]any{"roles": []string{"nested"}, "number": 1},
		"resource_access":           map[string]any{"my.client": map[string]any{"roles": "deep"}},
		"both":                      map[string]any{"roles": "nested"}, "both.roles": "named",
		"a":  map[string]any{"b": map[string]any{"x": "shallow"}, "b.c": "dotted"},
		"no": map[string]any{"roles": map[string]any{"admin": true}},
	})
	for claim, want := range map[string][]string{
		"": {"customer"}, "roles": {"customer"},
		"https://example.com/roles":       {"named"},
		"realm_access.roles":              {"nested"},
		"resource_access.my.client.roles": {"deep"},
		"both.roles":                      {"named"}, // a claim with exactly this name comes first
		"a.b.c":                           {"dotted"},
		"no.roles":                        nil, "realm_access": nil, "realm_access.": nil, ".roles": nil,
		"roles.customer": nil, "realm_access.roles.nested": nil, "realm_access.number": nil, "missing.roles": nil,
		"....": nil,
	} {
		caller, err := tokensWithRolesIn(t, claim, path).verify(t.Context(), token)
		if err != nil || !slices.Equal(caller.Roles, want) {
			t.Errorf("%q: got roles %q, want %q, error %v", claim, caller.Roles, want, err)
		}
	}
}

// withKeyInHeader returns a token that contains its own key. RFC 7515 allows this, but verifiers must not trust it.
func withKeyInHeader(t *testing.T, i *issuer) string {
	t.Helper()
	var set struct{ Keys []map[string]any }
	if err := json.Unmarshal(i.jwks, &set); err != nil {
		t.Fatal(err)
	}
	token := jwt.NewWithClaims(jwt.SigningMethodEdDSA, i.claim)
	for _, key := range set.Keys {
		if key["kid"] == "ed" {
			token.Header["jwk"] = key
		}
	}
	token.Header["jku"] = "https://evil.example/jwks"
	signed, err := token.SignedString(i.ed)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

func encode(t *testing.T, value any) string {
	t.Helper()
	text, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return base64.RawURLEncoding.EncodeToString(text)
}

func TestKeySetTakesUsableKeysOnly(t *testing.T) {
	t.Parallel()
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	other, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ed := string(keySetOf(t, map[string]crypto.PublicKey{"ed": ed25519.PublicKey(make([]byte, 32))}))
	for name, set := range map[string]string{
		"weak RSA key":    string(keySetOf(t, map[string]crypto.PublicKey{"weak": weak.Public()})),
		"another curve":   string(keySetOf(t, map[string]crypto.PublicKey{"p384": other.Public()})),
		"shared secret":   `{"keys":[{"kty":"oct","kid":"s","k":"c2VjcmV0"}]}`,
		"for encryption":  strings.Replace(ed, `"kid"`, `"use":"enc","kid"`, 1),
		"no keys":         `{"keys":[]}`,
		"not JSON":        `<html>`,
		"malformed key":   `{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"s","x":"AA"}]}`,
		"certificate URL": `{"keys":[{"kty":"RSA","kid":"s","x5u":"https://127.0.0.1:1/"}]}`,
	} {
		if _, err := parseJWKS([]byte(set)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	good := newIssuer(t)
	const unusable = `{"kty":"oct","kid":"s","k":"c2VjcmV0"},{"kty":"new"},`
	mixed := strings.Replace(string(good.jwks), `{"keys":[`, `{"keys":[`+unusable, 1)
	keys, err := parseJWKS([]byte(mixed))
	if err != nil {
		t.Fatal(err)
	}
	if all, err := keys.VerificationKeySet(context.Background()); err != nil || len(all.Keys) != 3 {
		t.Errorf("took %d keys of a mixed set, want 3: %v", len(all.Keys), err)
	}
}
