package auth

import (
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/golang-jwt/jwt/v5"
)

func TestKeySetSources(t *testing.T) {
	t.Parallel()
	for source, good := range map[string]bool{
		"https://issuer.example/jwks": true, "http://localhost:1/jwks": true, "http://127.0.0.1:1/": true,
		"http://[::1]:1/": true,

		"http://issuer.example/jwks": false, "http://127.0.0.1.example/": false, "https://": false,
		"/does/not/exist": false, "ftp://h/": false, "\x7f://": false,
	} {
		if _, err := NewKeySet(source); (err == nil) != good {
			t.Errorf("%q: got error %v", source, err)
		}
	}
}

func TestKeySetFollowsItsFile(t *testing.T) {
	t.Parallel()
	old, next := newIssuer(t), newIssuer(t)
	path := filepath.Join(t.TempDir(), "jwks.json")
	if err := os.WriteFile(path, old.jwks, 0o600); err != nil {
		t.Fatal(err)
	}
	tokens := old.tokensFrom(t, path)
	if _, err := tokens.verify(t.Context(), old.sign(t, jwt.SigningMethodEdDSA, "ed", old.ed, nil)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, next.jwks, 0o600); err != nil {
		t.Fatal(err)
	}
	token := next.sign(t, jwt.SigningMethodEdDSA, "ed", next.ed, nil)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) { // poll: files do not notify
		_, err := tokens.verify(t.Context(), token)
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if _, err := tokens.verify(t.Context(), old.sign(t, jwt.SigningMethodEdDSA, "ed", old.ed, nil)); err == nil {
		t.Error("a removed key is still accepted")
	}
}

// server returns a stored response without a network, so that tests can use synthetic time.
type server struct {
	answer atomic.Value // func() *http.Response
	asked  atomic.Int64
}

func (s *server) RoundTrip(*http.Request) (*http.Response, error) {
	s.asked.Add(1)
	return s.answer.Load().(func() *http.Response)(), nil
}

func answer(status int, body []byte) func() *http.Response {
	return func() *http.Response {
		recorder := httptest.NewRecorder()
		recorder.WriteHeader(status)
		_, _ = recorder.Write(body)
		return recorder.Result()
	}
}

func TestKeySetFollowsItsURL(t *testing.T) {
	t.Parallel()
	old, next := newIssuer(t), newIssuer(t)
	synctest.Test(t, func(t *testing.T) {
		source := new(server)
		source.answer.Store(answer(http.StatusServiceUnavailable, nil))
		tokens := old.tokensFrom(t, "https://issuer.example/jwks")
		tokens.keys.client.Transport = source
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { tokens.keys.Run(ctx) })
		defer running.Wait()
		defer cancel()
		// Tokens are signed just before use, because more than an hour passes in this test.
		code := func(i *issuer, id string) connect.Code {
			synctest.Wait()
			_, err := tokens.verify(t.Context(), i.sign(t, jwt.SigningMethodEdDSA, id, i.ed, jwt.MapClaims{
				"exp": time.Now().Add(time.Hour).Unix(), "iat": time.Now().Unix(),
			}))
			if err == nil {
				return 0
			}
			return connect.CodeOf(err)
		}
		want := func(situation string, i *issuer, id string, want connect.Code) {
			t.Helper()
			if got := code(i, id); got != want {
				t.Errorf("%s: got %s, want %s", situation, got, want)
			}
		}
		want("issuer away from the start", old, "ed", connect.CodeUnavailable)
		source.answer.Store(answer(http.StatusOK, old.jwks))
		time.Sleep(refetchAfter)
		want("issuer back", old, "ed", 0)

		source.answer.Store(answer(http.StatusServiceUnavailable, nil))
		time.Sleep(staleAfter)
		want("issuer away for a while", old, "ed", 0)
		time.Sleep(2 * time.Minute)
		want("issuer away for too long", old, "ed", connect.CodeUnavailable)

		source.answer.Store(answer(http.StatusOK, next.jwks))
		time.Sleep(refetchAfter)
		want("new key", next, "ed", 0)
		want("revoked key", old, "ed", connect.CodeUnauthenticated)

		time.Sleep(refetchAfter) // pass the lower bound of rest
		asked := source.asked.Load()
		for range 1000 {
			want("made-up key", next, "made up", connect.CodeUnauthenticated)
		}
		if n := source.asked.Load() - asked; n != 1 {
			t.Errorf("a thousand made-up key IDs caused %d fetches, want 1", n)
		}
	})
}

func TestKeySetRefusesRedirectsAndHugeResponses(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	mux := http.NewServeMux()
	mux.HandleFunc("/moved", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "/jwks", http.StatusFound)
	})
	mux.HandleFunc("/jwks", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(i.jwks) })
	mux.HandleFunc("/giant", func(w http.ResponseWriter, _ *http.Request) {
		for range 4 << 10 {
			if _, err := w.Write(make([]byte, 1<<10)); err != nil {
				return
			}
		}
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	for path, good := range map[string]bool{"/jwks": true, "/moved": false, "/giant": false} {
		keys, err := NewKeySet(server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		if err := keys.fetch(t.Context()); (err == nil) != good {
			t.Errorf("%s: got error %v", path, err)
		}
	}
}
