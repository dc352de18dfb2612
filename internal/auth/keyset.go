package auth

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"example.com/shop/internal/bounds"
	"example.com/shop/internal/reload"
	"github.com/MicahParks/keyfunc/v3"
)

const (
	// refreshEvery is how long a key that the issuer has revoked is still accepted, while the issuer can be reached.
	refreshEvery = 5 * time.Minute
	// staleAfter is how long keys are used while the issuer cannot be reached. It bounds the use of a revoked key.
	staleAfter = time.Hour
	// refetchAfter is the least time between two fetches: after a failure, and when tokens name unknown keys. Anybody
	// can make up a key ID.
	refetchAfter = 10 * time.Second
	// fetchTimeout bounds one fetch.
	fetchTimeout = 5 * time.Second
	// maxKeySet is the largest key set in bytes, more than any sane issuer needs.
	maxKeySet = 1 << 20
)

// KeySet holds the issuer's public keys (JWKS, RFC 7517).
type KeySet struct {
	url    string // "" if the keys come from a file
	file   *reload.Value[keyfunc.Keyfunc]
	client *http.Client
	hint   chan struct{} // a token names an unknown key

	mu      sync.Mutex
	keys    keyfunc.Keyfunc
	fetched time.Time
}

// NewKeySet makes a key set from a file, which must exist, or from a URL, which Run fetches. A URL must use https
// unless its host is this machine.
func NewKeySet(source string) (*KeySet, error) {
	parsed, err := url.Parse(source)
	if err != nil {
		return nil, errors.New("JWKS: neither a URL nor a file")
	}
	switch parsed.Scheme {
	case "https", "http":
		if parsed.Host == "" || parsed.Scheme == "http" && !isLocal(parsed.Hostname()) {
			return nil, errors.New("JWKS: URL must use https: without TLS an attacker can replace the keys")
		}
		client := &http.Client{
			Timeout:   fetchTimeout,
			Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true},
			// A redirect could lead to any host, or to plain http.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}
		return &KeySet{url: source, client: client, hint: make(chan struct{}, 1)}, nil
	}
	if strings.Contains(source, "://") {
		// The error of os.ReadFile would quote the source.
		return nil, errors.New("JWKS: source must be an https URL or the path of a file")
	}
	file, err := reload.New(func() (keyfunc.Keyfunc, error) {
		text, err := os.ReadFile(source)
		if err != nil {
			return nil, fmt.Errorf("JWKS: %w", err)
		}
		keys, err := parseJWKS(text)
		if err != nil {
			return nil, fmt.Errorf("JWKS: %w", err)
		}
		return keys, nil
	}, source)
	if err != nil {
		return nil, err
	}
	return &KeySet{file: file}, nil
}

func isLocal(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// Run keeps the keys of a URL fresh until ctx is done.
func (s *KeySet) Run(ctx context.Context) {
	if s.file != nil {
		<-ctx.Done()
		return
	}
	for ctx.Err() == nil {
		pause := refreshEvery
		if err := s.fetch(ctx); err != nil {
			slog.WarnContext(ctx, "token issuer's keys cannot be fetched",
				"url", bounds.URLs(s.url), "error", bounds.URLs(err.Error()))
			pause = refetchAfter
		}
		s.rest(ctx, pause)
	}
}

// rest waits until the next fetch is due. A hint shortens the pause, but not below refetchAfter.
func (s *KeySet) rest(ctx context.Context, pause time.Duration) {
	due, soonest := time.After(pause), time.After(refetchAfter)
	select {
	case <-ctx.Done():
		return
	case <-soonest:
	}
	select {
	case <-ctx.Done():
	case <-due:
	case <-s.hint:
	}
}

// wake requests an early fetch.
func (s *KeySet) wake() {
	select {
	case s.hint <- struct{}{}:
	default: // requested already, or the keys come from a file, which needs no fetch
	}
}

func (s *KeySet) fetch(ctx context.Context) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url, nil)
	if err != nil {
		return err
	}
	response, err := s.client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("response status is %s", response.Status)
	}
	text, err := io.ReadAll(io.LimitReader(response.Body, maxKeySet))
	if err != nil {
		return err
	}
	keys, err := parseJWKS(text)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys, s.fetched = keys, time.Now()
	return nil
}

// Ready returns an error until the keys have been fetched once. It ignores their age: a later outage of the issuer
// affects every replica, and taking all of them out of service would fix nothing.
func (s *KeySet) Ready(context.Context) error {
	if s.file != nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keys == nil {
		return errNeverFetched
	}
	return nil
}

var errNeverFetched = errors.New("token issuer's keys were never fetched")

// current returns the keys, or an error if they were never fetched or are stale.
func (s *KeySet) current() (keyfunc.Keyfunc, error) {
	if s.file != nil {
		return s.file.Get(), nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keys == nil {
		return nil, errNeverFetched
	}
	if age := time.Since(s.fetched); age > staleAfter {
		return nil, fmt.Errorf("token issuer's keys are %s old", age.Round(time.Second))
	}
	return s.keys, nil
}
