package rabbit

import (
	"crypto/tls"
	"io"
	"net"
	"net/url"
	"path/filepath"
	"sync"
	"testing"

	"example.com/shop/internal/dev/testenv"
)

// encrypt starts a TLS proxy before a broker and returns its URL. It calls config at each handshake.
func encrypt(t *testing.T, amqpURL string, config func() *tls.Config) string {
	t.Helper()
	parsed, err := url.Parse(amqpURL)
	if err != nil {
		t.Fatal(err)
	}
	target := parsed.Host
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return config(), nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return // closed
			}
			running.Go(func() { forward(client, target) })
		}
	})
	t.Cleanup(func() { listener.Close(); running.Wait() })
	parsed.Scheme, parsed.Host = "amqps", listener.Addr().String()
	return parsed.String()
}

func forward(client net.Conn, target string) {
	defer client.Close()
	server, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer server.Close()
	ended := make(chan struct{}, 2)
	for _, pair := range [][2]net.Conn{{client, server}, {server, client}} {
		go func() {
			_, _ = io.Copy(pair[0], pair[1])
			client.Close()
			server.Close()
			ended <- struct{}{}
		}()
	}
	<-ended
	<-ended
}

func TestTLS(t *testing.T) {
	t.Parallel()
	authority, next := testenv.NewAuthority(t), testenv.NewAuthority(t)
	serverCert, serverKey := authority.Issue(t, nil)
	trusted := authority
	plain := encrypt(t, testenv.AMQP(t), func() *tls.Config {
		config := trusted.Client(t, serverCert, serverKey)
		config.ClientCAs, config.ClientAuth = config.RootCAs, tls.RequireAndVerifyClientCert
		return config
	})
	cert, key := authority.Issue(t, nil)
	root := filepath.Join(t.TempDir(), "root.pem")
	testenv.Copy(t, authority.File, root)
	with := func(authority string, settings ...string) string {
		query := url.Values{"cacertfile": {authority}}
		for i := 0; i < len(settings); i += 2 {
			query.Set(settings[i], settings[i+1])
		}
		return plain + "?" + query.Encode()
	}
	good := with(root, "certfile", cert, "keyfile", key)
	if err := ValidateURL(good); err != nil {
		t.Fatal(err)
	}
	if err := Check(t.Context(), good); err != nil {
		t.Fatal(err)
	}
	for name, url := range map[string]string{
		"system's authorities":  plain,
		"another authority":     with(next.File, "certfile", cert, "keyfile", key),
		"no client certificate": with(root),
		"another server name": with(root, "certfile", cert, "keyfile", key, "server_name_indication",
			"broker.example"),
		"missing file": with(root + "x"),
	} {
		if err := Check(t.Context(), url); err == nil {
			t.Errorf("%s: the connection succeeded", name)
		}
	}

	// All certificates are replaced, as in a yearly rotation. The next connection uses the new ones.
	trusted = next
	next.Replace(t, serverCert, serverKey, nil)
	if err := Check(t.Context(), good); err == nil {
		t.Error("the new server accepts the old files: the test proves nothing")
	}
	next.Replace(t, cert, key, nil)
	testenv.Copy(t, next.File, root)
	if err := Check(t.Context(), good); err != nil {
		t.Errorf("with new certificates: %v", err)
	}
}
