package rpcserver

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"

	"example.com/shop/internal/reload"
)

// TLSFiles are PEM files. They may be replaced at any time. New handshakes use the new files after at most a second.
type TLSFiles struct {
	// Cert is the server's certificate with its chain. Key is its private key.
	Cert, Key string
	// ClientCA has the authorities whose client certificates are accepted. If it is "", the server requests no
	// certificate.
	ClientCA string
	// RequireClient refuses connections without a client certificate. Probes use the operators' port, which requests none.
	RequireClient bool
}

// LoadTLS reads the files and returns a configuration for Config.TLS: TLS 1.2 and above, HTTP/2 and HTTP/1.1 by ALPN.
func LoadTLS(files TLSFiles) (*tls.Config, error) {
	pair, err := reload.New(func() (*tls.Certificate, error) {
		pair, err := tls.LoadX509KeyPair(files.Cert, files.Key)
		if err != nil {
			return nil, fmt.Errorf("load TLS certificate: %w", err)
		}
		return &pair, nil
	}, files.Cert, files.Key)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"h2", "http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return pair.Get(), nil },
	}
	if files.ClientCA == "" {
		return config, nil
	}
	return config, requestCertificate(config, files)
}

func requestCertificate(config *tls.Config, files TLSFiles) error {
	authorities, err := reload.New(func() (*x509.CertPool, error) {
		pem, err := os.ReadFile(files.ClientCA)
		if err != nil {
			return nil, fmt.Errorf("load client authorities: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, errors.New("load client authorities: file has no certificate")
		}
		return pool, nil
	}, files.ClientCA)
	if err != nil {
		return err
	}
	config.ClientAuth = tls.VerifyClientCertIfGiven
	if files.RequireClient {
		config.ClientAuth = tls.RequireAndVerifyClientCert
	}
	config.SessionTicketsDisabled = true // a resumed session would stay valid after its authority is removed
	base := config.Clone()
	config.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		current := base.Clone()
		current.ClientCAs = authorities.Get()
		return current, nil
	}
	return nil
}
