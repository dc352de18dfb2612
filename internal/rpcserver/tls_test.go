package rpcserver_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rpcserver"
)

// whoAmI answers with the caller's name and roles.
func whoAmI(ctx context.Context, _ string) (string, error) {
	caller, ok := auth.FromContext(ctx)
	if !ok {
		return "nobody", nil
	}
	return fmt.Sprint(caller.By, " ", caller.Subject, " ", caller.Roles), nil
}

// serveTLS starts a TLS server with the unary method whoAmI.
func serveTLS(t *testing.T, files rpcserver.TLSFiles) *running {
	t.Helper()
	config, err := rpcserver.LoadTLS(files)
	if err != nil {
		t.Fatal(err)
	}
	server := serve(t, rpcserver.Config{TLS: config, Interceptors: []connect.ServerInterceptor{
		auth.Identify(auth.Config{Certificates: true}),
	}}, unary(whoAmI))
	server.url = strings.Replace(server.url, "http://", "https://", 1)
	return server
}

// tlsClient returns a client with its own connections.
func tlsClient(t *testing.T, config *tls.Config, http2 bool) *http.Client {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(!http2)
	protocols.SetHTTP2(http2)
	transport := &http.Transport{Protocols: protocols, TLSClientConfig: config}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func askWho(
	t *testing.T, server *running, config *tls.Config, http2 bool, options ...connecthttp.Option,
) (string, error) {
	transport := connecthttp.NewTransport(tlsClient(t, config, http2), server.url, options...)
	return call(t.Context(), connect.NewClient(transport), "")
}

func TestTLSServesEveryProtocol(t *testing.T) {
	t.Parallel()
	authority := testenv.NewAuthority(t)
	cert, key := authority.Issue(t, nil)
	server := serveTLS(t, rpcserver.TLSFiles{Cert: cert, Key: key})
	for _, transport := range transports {
		who, err := askWho(t, server, authority.Client(t, "", ""), transport.http2, transport.options...)
		if err != nil || who != "nobody" {
			t.Errorf("%s: got %q, %v", transport.name, who, err)
		}
	}
	res, err := http.Get(strings.Replace(server.url, "https://", "http://", 1) + unarySpec.Procedure)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusBadRequest {
		t.Errorf("plain HTTP: %s", res.Status)
	}
	old := authority.Client(t, "", "")
	old.MaxVersion = tls.VersionTLS11
	if _, err := askWho(t, server, old, false); err == nil {
		t.Error("TLS 1.1 is accepted")
	}
	if _, err := askWho(t, server, testenv.NewAuthority(t).Client(t, "", ""), true); err == nil {
		t.Error("a client that trusts another authority accepted the server, so this test proves nothing")
	}
}

func TestTLSCertificateIsReloaded(t *testing.T) {
	t.Parallel()
	old, next := testenv.NewAuthority(t), testenv.NewAuthority(t)
	cert, key := old.Issue(t, nil)
	server := serveTLS(t, rpcserver.TLSFiles{Cert: cert, Key: key})
	connected := connect.NewClient(connecthttp.NewTransport(tlsClient(t, old.Client(t, "", ""), true), server.url))
	if _, err := call(t.Context(), connected, ""); err != nil {
		t.Fatal(err)
	}

	// A new certificate without its key has no effect.
	otherCert, _ := next.Issue(t, nil)
	testenv.Copy(t, otherCert, cert)
	time.Sleep(1100 * time.Millisecond) // longer than the reload interval
	if _, err := askWho(t, server, old.Client(t, "", ""), true); err != nil {
		t.Errorf("with a certificate that does not match the key: %v", err)
	}

	next.Replace(t, cert, key, nil)
	testenv.Eventually(t, 10*time.Second, func() error {
		_, err := askWho(t, server, next.Client(t, "", ""), true)
		return err
	})
	if _, err := askWho(t, server, old.Client(t, "", ""), true); err == nil {
		t.Error("the old certificate is still served")
	}
	if _, err := call(t.Context(), connected, ""); err != nil {
		t.Errorf("an earlier connection: %v", err)
	}
}

func TestClientCertificates(t *testing.T) {
	t.Parallel()
	servers, clients, stranger := testenv.NewAuthority(t), testenv.NewAuthority(t), testenv.NewAuthority(t)
	cert, key := servers.Issue(t, nil)
	files := rpcserver.TLSFiles{Cert: cert, Key: key, ClientCA: clients.File}
	optional := serveTLS(t, files)
	files.RequireClient = true
	required := serveTLS(t, files)
	named := func(a *testenv.Authority, change func(*x509.Certificate)) *tls.Config {
		cert, key := a.Issue(t, func(c *x509.Certificate) {
			c.Subject = pkix.Name{CommonName: "ann", Organization: []string{"customer", "operator"}}
			if change != nil {
				change(c)
			}
		})
		return servers.Client(t, cert, key)
	}
	spiffe, err := url.Parse("spiffe://example.org/billing")
	if err != nil {
		t.Fatal(err)
	}
	changed := func(change func(*x509.Certificate)) *tls.Config { return named(clients, change) }
	withName := func(name string) *tls.Config {
		return changed(func(c *x509.Certificate) { c.Subject.CommonName = name })
	}
	uri := func(c *x509.Certificate) { c.URIs = []*url.URL{spiffe} }
	expired := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
	serverOnly := func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }
	const (
		ann     = "mtls ann [customer operator]"
		billing = "mtls spiffe://example.org/billing [customer operator]"
		refused = "" // at the handshake
	)
	for name, test := range map[string]struct {
		client             *tls.Config
		optional, required string
	}{
		"good":                      {named(clients, nil), ann, ann},
		"SPIFFE ID":                 {changed(uri), billing, billing},
		"none":                      {servers.Client(t, "", ""), "nobody", refused},
		"stranger":                  {named(stranger, nil), refused, refused},
		"of the servers' authority": {named(servers, nil), refused, refused},
		"expired":                   {changed(expired), refused, refused},
		"for a server":              {changed(serverOnly), refused, refused},
		"with a NUL in its name":    {withName("a\x00b"), "nobody", "nobody"},
		"with a name too long":      {withName(strings.Repeat("a", 300)), "nobody", "nobody"},
		"without a name":            {withName(""), "nobody", "nobody"},
	} {
		for _, http2 := range []bool{false, true} {
			who, err := askWho(t, optional, test.client, http2)
			if who != test.optional || (err != nil) != (test.optional == refused) {
				t.Errorf("%s, optional: got %q, %v", name, who, err)
			}
			who, err = askWho(t, required, test.client, http2)
			if who != test.required || (err != nil) != (test.required == refused) {
				t.Errorf("%s, required: got %q, %v", name, who, err)
			}
		}
	}

	// Certificates of a removed authority are refused, even in a resumed session.
	again := named(clients, nil)
	again.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	if _, err := askWho(t, optional, again, true); err != nil {
		t.Fatal(err)
	}
	testenv.Copy(t, stranger.File, clients.File)
	testenv.Eventually(t, 10*time.Second, func() error {
		if _, err := askWho(t, optional, again, true); err == nil {
			return errors.New("still accepted")
		}
		return nil
	})
}

func TestUnusableTLSFiles(t *testing.T) {
	t.Parallel()
	authority := testenv.NewAuthority(t)
	cert, key := authority.Issue(t, nil)
	_, otherKey := authority.Issue(t, nil)
	for name, files := range map[string]rpcserver.TLSFiles{
		"no certificate":    {Cert: cert + "x", Key: key},
		"another key":       {Cert: cert, Key: otherKey},
		"no authorities":    {Cert: cert, Key: key, ClientCA: cert + "x"},
		"key for authority": {Cert: cert, Key: key, ClientCA: key},
	} {
		if _, err := rpcserver.LoadTLS(files); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// The server closes a silent connection before it spends a handshake on it.
func TestSilentHandshakeIsCutOff(t *testing.T) {
	t.Parallel()
	authority := testenv.NewAuthority(t)
	cert, key := authority.Issue(t, nil)
	config, err := rpcserver.LoadTLS(rpcserver.TLSFiles{Cert: cert, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	server := serve(t, rpcserver.Config{TLS: config, ReadHeaderTimeout: 50 * time.Millisecond}, unary(echo))
	conn, err := net.Dial("tcp", server.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	var timeout net.Error
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("got %v, want a closed connection", err)
	}
}
