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
	// refreshEvery is how long a key that the issuer took back is still accepted, while the issuer can be reached.
	refreshEvery = 5 * time.Minute
	// staleAfter is how long keys are used while the issuer cannot be reached. Then a key that was taken back must not live on for ever.
	staleAfter = time.Hour
	// refetchAfter is the time between two tries: after a failure, and when tokens name unknown keys, which anybody can make up.
	refetchAfter = 10 * time.Second
	// fetchTimeout bounds one try.
	fetchTimeout = 5 * time.Second
	// maxKeySet is more than any sane key set has.
	maxKeySet = 1 << 20
)

// KeySet is the issuer's public keys (JWKS, RFC 7517).
type KeySet struct {
	url    string // "" if they come from a file
	file   *reload.Value[keyfunc.Keyfunc]
	client *http.Client
	hint   chan struct{} // a token names a key that we do not have

	mu      sync.Mutex
	keys    keyfunc.Keyfunc
	fetched time.Time
}

// NewKeySet makes a key set of a file, which must be there, or of a URL, which Run fetches. A URL has https, unless its host is this machine.
func NewKeySet(source string) (*KeySet, error) {
	parsed, err := url.Parse(source)
	if err != nil {
		return nil, errors.New("JWKS: neither a URL nor a file")
	}
	switch parsed.Scheme {
	case "https", "http":
		if parsed.Host == "" || parsed.Scheme == "http" && !isLocal(parsed.Hostname()) {
			return nil, errors.New("JWKS: a URL needs https: whoever can change the keys on their way is any caller")
		}
		client := &http.Client{
			Timeout:   fetchTimeout,
			Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true},
			// A redirect could lead anywhere, and to plain http.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}
		return &KeySet{url: source, client: client, hint: make(chan struct{}, 1)}, nil
	}
	if strings.Contains(source, "://") {
		return nil, errors.New("JWKS: a URL needs https, and a file is named by its path") // an error of the file would show it
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
			slog.WarnContext(ctx, "keys of the token issuer cannot be fetched", "url", bounds.URLs(s.url), "error", bounds.URLs(err.Error()))
			pause = refetchAfter
		}
		s.rest(ctx, pause)
	}
}

// rest waits until it is time to fetch again, or somebody needs it and the last time is long enough ago.
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

// wake asks for the keys to be fetched soon.
func (s *KeySet) wake() {
	select {
	case s.hint <- struct{}{}:
	default: // asked before, or a file, which has no hint
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
		return fmt.Errorf("answer is %s", response.Status)
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

// Ready returns an error until the keys were there for the first time. It says nothing of their age: what the issuer's absence means later is the
// same on every replica, and taking all of them out of service would mend nothing.
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

var errNeverFetched = errors.New("keys of the token issuer were never fetched")

// current returns the keys, or why there are none to be trusted.
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
		return nil, fmt.Errorf("keys of the token issuer are %s old", age.Round(time.Second))
	}
	return s.keys, nil
}
