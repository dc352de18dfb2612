package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"os"
	"regexp"
	"strings"

	"example.com/shop/internal/reload"
)

// Keys are the API keys that the service accepts. A key is "id.secret". Only one line of it is stored:
//
//	id:role[,role...]:SHA-256 of the whole key, in hexadecimal
//
// A plain hash is enough: a secret has 128 random bits, so no dictionary can find it. An ID may have several lines, so
// that a new key works before the old one is removed. Empty lines and lines that begin with # are ignored.
type Keys struct{ byID func() map[string][]key }

type key struct {
	roles []string
	hash  [sha256.Size]byte
}

// ReadKeys reads the lines of a file, and reads it again when it changes.
func ReadKeys(path string) (*Keys, error) {
	value, err := reload.New(func() (map[string][]key, error) {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read API keys: %w", err)
		}
		return parseKeys(string(text))
	}, path)
	if err != nil {
		return nil, err
	}
	return &Keys{byID: value.Get}, nil
}

// ParseKeys parses lines that are separated by line breaks or blanks.
func ParseKeys(text string) (*Keys, error) {
	keys, err := parseKeys(strings.Join(strings.Fields(text), "\n"))
	if err != nil {
		return nil, err
	}
	return &Keys{byID: func() map[string][]key { return keys }}, nil
}

var word = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// parseKeys never quotes a line in an error: the line may be a key that was pasted by mistake.
func parseKeys(text string) (map[string][]key, error) {
	keys := make(map[string][]key)
	for n, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		fields := strings.Split(line, ":")
		if len(fields) != 3 {
			return nil, fmt.Errorf("API key on line %d: want id:role[,role]:sha256, as `apikey new` prints it", n+1)
		}
		k := key{roles: strings.Split(fields[1], ",")}
		if err := checkNames(fields[0], k.roles); err != nil {
			return nil, fmt.Errorf("API key on line %d: %w", n+1, err)
		}
		hash, err := hex.DecodeString(fields[2])
		if err != nil || copy(k.hash[:], hash) != sha256.Size || len(hash) != sha256.Size {
			return nil, fmt.Errorf("API key on line %d: hash is not 64 hexadecimal digits", n+1)
		}
		keys[fields[0]] = append(keys[fields[0]], k)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("no API keys found")
	}
	return keys, nil
}

func checkNames(id string, roles []string) error {
	if !word.MatchString(id) {
		return fmt.Errorf("ID is not 1 to 64 letters, digits, - and _")
	}
	for _, role := range roles {
		if !word.MatchString(role) {
			return fmt.Errorf("role is not 1 to 64 letters, digits, - and _")
		}
	}
	return nil
}

// NewKey generates a key for an ID. It returns the key, which must be shown to its owner once, and the line to store.
func NewKey(id string, roles []string) (secret, line string, err error) {
	if err := checkNames(id, roles); err != nil {
		return "", "", err
	}
	secret = id + "." + rand.Text()
	hash := sha256.Sum256([]byte(secret))
	return secret, id + ":" + strings.Join(roles, ",") + ":" + hex.EncodeToString(hash[:]), nil
}

func (k *Keys) verify(secret string) (Caller, error) {
	if k == nil {
		return Caller{}, errInvalid
	}
	id, _, _ := strings.Cut(secret, ".")
	hash := sha256.Sum256([]byte(secret))
	for _, candidate := range k.byID()[id] {
		if subtle.ConstantTimeCompare(hash[:], candidate.hash[:]) == 1 {
			return Caller{Subject: id, Roles: candidate.roles, By: "apikey"}, nil
		}
	}
	return Caller{}, errInvalid
}
