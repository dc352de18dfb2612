package rabbit

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	amqp "github.com/rabbitmq/amqp091-go"
)

// unencrypted returns url with the scheme for connections without TLS.
func unencrypted(url string) string {
	if rest, ok := strings.CutPrefix(url, "amqps:"); ok {
		return "amqp:" + rest
	}
	return url
}

func address(uri amqp.URI) string { return net.JoinHostPort(uri.Host, strconv.Itoa(uri.Port)) }

// secure wraps conn in TLS if uri requires it.
func secure(ctx context.Context, conn net.Conn, uri amqp.URI) (net.Conn, error) {
	if uri.Scheme != "amqps" {
		return conn, nil
	}
	config, err := tlsConfig(uri)
	if err != nil {
		return nil, err
	}
	secured := tls.Client(conn, config)
	return secured, secured.HandshakeContext(ctx)
}

// tlsConfig reads the files that a URL names: cacertfile (default: the system's authorities), certfile and keyfile. It
// takes the server name from the URL too, if it differs from the host.
func tlsConfig(uri amqp.URI) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: uri.ServerName}
	if config.ServerName == "" {
		config.ServerName = uri.Host
	}
	if uri.CACertFile != "" {
		pem, err := os.ReadFile(uri.CACertFile)
		if err != nil {
			return nil, fmt.Errorf("read authorities: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, errors.New("read authorities: no certificate in " + uri.CACertFile)
		}
	}
	if uri.CertFile != "" && uri.KeyFile != "" {
		pair, err := tls.LoadX509KeyPair(uri.CertFile, uri.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("load client certificate: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}
