package main

import (
	"errors"
	"fmt"
	"math"

	"example.com/shop/internal/app"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/rpcserver"
)

// edgeFlags configure authentication, TLS and the limits of calls.
type edgeFlags struct {
	JWKS        string   `name:"jwks" env:"JWT_JWKS" help:"Keys of the token issuer: an https URL or a file."`
	Issuer      string   `name:"jwt-issuer" env:"JWT_ISSUER" help:"Required issuer (iss) of a token."`
	Audience    string   `name:"jwt-audience" env:"JWT_AUDIENCE" help:"Required audience (aud) of a token."`
	RolesClaim  string   `name:"jwt-roles-claim" env:"JWT_ROLES_CLAIM" default:"roles" help:"${roles_claim}"`
	APIKeysFile string   `name:"api-keys-file" env:"API_KEYS_FILE" help:"File of API keys, as lines from 'apikey new'."`
	APIKeys     string   `name:"api-keys" env:"API_KEYS" help:"The same lines inline, separated by whitespace."`
	NoAuth      bool     `name:"insecure-no-auth" env:"INSECURE_NO_AUTH" help:"For development only: allow all calls."`
	NoAuthHosts []string `name:"insecure-no-auth-hosts" env:"INSECURE_NO_AUTH_HOSTS" help:"${no_auth_hosts}"`

	TLSCert     string `name:"tls-cert" env:"TLS_CERT" help:"${tls_cert}"`
	TLSKey      string `name:"tls-key" env:"TLS_KEY" help:"Private key (PEM) of the certificate."`
	TLSClientCA string `name:"tls-client-ca" env:"TLS_CLIENT_CA" help:"${tls_client_ca}"`
	TLSRequire  bool   `name:"tls-client-required" env:"TLS_CLIENT_REQUIRED" help:"${tls_client_required}"`

	CallerRate        float64 `env:"CALLER_RATE" default:"500" help:"${caller_rate}"`
	CallerBurst       int     `env:"CALLER_BURST" default:"1000" help:"Maximum burst of calls of one caller, 1 or more."`
	CallerConcurrency int     `env:"CALLER_CONCURRENCY" default:"200" help:"${caller_concurrency}"`
	ReadMaxBytes      int     `env:"READ_MAX_BYTES" default:"4194304" help:"${read_max_bytes}"`
	InFlightMaxBytes  int64   `env:"IN_FLIGHT_MAX_BYTES" default:"0" help:"${in_flight_max_bytes}"`
	HTTPMaxConns      int     `name:"http-max-conns" env:"HTTP_MAX_CONNS" default:"4096" help:"${max_http_conns}"`

	HTTPMaxConnsPerAddress int `env:"HTTP_MAX_CONNS_PER_ADDRESS" default:"-1" help:"${conns_per_address}"`

	CORSOrigins []string `name:"cors-origins" env:"CORS_ORIGINS" help:"${cors_origins}"`
}

func (f *edgeFlags) check() error {
	for _, check := range []func() error{f.checkCredentials, f.checkTLS, f.checkLimits} {
		if err := check(); err != nil {
			return err
		}
	}
	for _, origin := range f.CORSOrigins {
		if err := rpcserver.CheckOrigin(origin); err != nil {
			return fmt.Errorf("--cors-origins: %q is not a web origin, such as https://console.example", origin)
		}
	}
	return nil
}

func (f *edgeFlags) checkCredentials() error {
	tokens := f.JWKS != "" || f.Issuer != "" || f.Audience != ""
	some := tokens || f.APIKeysFile != "" || f.APIKeys != "" || f.TLSClientCA != ""
	switch {
	case tokens && (f.JWKS == "" || f.Issuer == "" || f.Audience == ""):
		return errors.New("--jwks, --jwt-issuer and --jwt-audience: set all three, or none")
	case f.APIKeysFile != "" && f.APIKeys != "":
		return errors.New("--api-keys-file and --api-keys: set only one of them")
	case some && f.NoAuth:
		return errors.New("--insecure-no-auth: cannot be combined with credentials")
	case !some && !f.NoAuth:
		return errors.New("no credentials are accepted: set --jwks, --api-keys-file or --tls-client-ca, " +
			"or for development --insecure-no-auth (INSECURE_NO_AUTH=true)")
	}
	return nil
}

func (f *edgeFlags) checkTLS() error {
	switch {
	case (f.TLSCert == "") != (f.TLSKey == ""):
		return errors.New("--tls-cert and --tls-key: set both, or none")
	case f.TLSClientCA != "" && f.TLSCert == "":
		return errors.New("--tls-client-ca: needs --tls-cert and --tls-key")
	case f.TLSRequire && f.TLSClientCA == "":
		return errors.New("--tls-client-required: needs --tls-client-ca")
	}
	return nil
}

func (f *edgeFlags) checkLimits() error {
	if !(f.CallerRate >= 0 && f.CallerRate <= 1e6) { // also catches NaN
		return fmt.Errorf("--caller-rate: %v is not between 0 and 1000000", f.CallerRate)
	}
	for _, err := range []error{
		between("--caller-burst", f.CallerBurst, 1, math.MaxInt32),
		between("--caller-concurrency", f.CallerConcurrency, 0, math.MaxInt32),
		between("--read-max-bytes", f.ReadMaxBytes, 1<<10, 64<<20),
		between("--in-flight-max-bytes", f.InFlightMaxBytes, 0, 1<<40),
		between("--http-max-conns", f.HTTPMaxConns, 1, 1_000_000),
		between("--http-max-conns-per-address", f.HTTPMaxConnsPerAddress, -1, 1_000_000),
	} {
		if err != nil {
			return err
		}
	}
	return nil
}

func (f *edgeFlags) config() app.Edge {
	return app.Edge{
		JWKS: f.JWKS, Tokens: auth.TokenConfig{Issuer: f.Issuer, Audience: f.Audience, RolesClaim: f.RolesClaim},
		APIKeysFile: f.APIKeysFile, APIKeys: f.APIKeys, NoAuth: f.NoAuth, NoAuthHosts: f.NoAuthHosts,
		TLS: rpcserver.TLSFiles{
			Cert: f.TLSCert, Key: f.TLSKey, ClientCA: f.TLSClientCA, RequireClient: f.TLSRequire,
		},
		Limit:   rpcserver.LimitConfig{Rate: f.CallerRate, Burst: f.CallerBurst, Concurrent: f.CallerConcurrency},
		Origins: f.CORSOrigins, ReadMaxBytes: f.ReadMaxBytes, InFlightBytes: f.InFlightMaxBytes,
		MaxConns: f.HTTPMaxConns, MaxConnsPerAddress: f.maxConnsPerAddress(),
	}
}

// maxConnsPerAddress converts the setting for rpcserver.Config, where 0 is the default and less is no limit.
func (f *edgeFlags) maxConnsPerAddress() int {
	switch f.HTTPMaxConnsPerAddress {
	case -1:
		return 0
	case 0:
		return -1
	}
	return f.HTTPMaxConnsPerAddress
}

// apiKeyCommand creates API keys. It needs no database: a key is only a line of the configuration.
type apiKeyCommand struct {
	New newAPIKeyCommand `cmd:"" help:"Create an API key: the key for its owner, and the line for the service."`
}

type newAPIKeyCommand struct {
	ID    string   `arg:"" help:"Name of the caller: letters, digits, - and _."`
	Roles []string `arg:"" help:"Roles of the caller, such as customer operator."`
}

func (c *newAPIKeyCommand) Run() error {
	key, line, err := auth.NewKey(c.ID, c.Roles)
	if err != nil {
		return err
	}
	fmt.Println("key: ", key, " (shown only once; send it as x-api-key)")
	fmt.Println("line:", line, " (for the file of --api-keys-file)")
	return nil
}
