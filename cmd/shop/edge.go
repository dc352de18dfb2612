package main

import (
	"errors"
	"fmt"
	"math"

	"example.com/shop/internal/app"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/rpcserver"
)

// edgeFlags say who may call the API, and what a call may cost.
type edgeFlags struct {
	JWKS        string   `name:"jwks" env:"JWT_JWKS" help:"Keys of the token issuer: an https URL or a file."`
	Issuer      string   `name:"jwt-issuer" env:"JWT_ISSUER" help:"What a token's iss must be."`
	Audience    string   `name:"jwt-audience" env:"JWT_AUDIENCE" help:"What a token's aud must contain."`
	RolesClaim  string   `name:"jwt-roles-claim" env:"JWT_ROLES_CLAIM" default:"roles" help:"Claim that lists a caller's roles: its name, or a path to a nested claim, such as realm_access.roles."`
	APIKeysFile string   `name:"api-keys-file" env:"API_KEYS_FILE" help:"File of API keys, a line each as 'apikey new' prints it."`
	APIKeys     string   `name:"api-keys" env:"API_KEYS" help:"Such lines themselves, divided by blanks."`
	NoAuth      bool     `name:"insecure-no-auth" env:"INSECURE_NO_AUTH" help:"For development only: let everybody call everything."`
	NoAuthHosts []string `name:"insecure-no-auth-hosts" env:"INSECURE_NO_AUTH_HOSTS" help:"Host names, besides localhost and loopback addresses, under which it is served then, divided by commas."`

	TLSCert     string `name:"tls-cert" env:"TLS_CERT" help:"Certificate chain (PEM) to serve HTTPS with. A new file is used without a restart."`
	TLSKey      string `name:"tls-key" env:"TLS_KEY" help:"Its private key (PEM)."`
	TLSClientCA string `name:"tls-client-ca" env:"TLS_CLIENT_CA" help:"Authorities (PEM) whose client certificates are credentials: common name or SPIFFE ID is the caller, organizations are its roles."`
	TLSRequire  bool   `name:"tls-client-required" env:"TLS_CLIENT_REQUIRED" help:"Refuse connections without a client certificate."`

	CallerRate        float64  `env:"CALLER_RATE" default:"500" help:"Calls a second of one caller in the long run, 0 to 1000000; 0 for no limit."`
	CallerBurst       int      `env:"CALLER_BURST" default:"1000" help:"Calls that one caller may make at once after a rest, 1 or more."`
	CallerConcurrency int      `env:"CALLER_CONCURRENCY" default:"200" help:"Calls of one caller under way, streams included, 0 or more; 0 for no limit."`
	ReadMaxBytes      int      `env:"READ_MAX_BYTES" default:"4194304" help:"Largest request message in bytes, before and after decompression, 1024 to 67108864."`
	InFlightMaxBytes  int64    `env:"IN_FLIGHT_MAX_BYTES" default:"0" help:"Most memory in bytes that requests under way may hold together, 0 to 1099511627776, a caller a quarter of it; 0 for a sixth of the memory limit, or 256 MiB without one."`
	HTTPMaxConns      int      `name:"http-max-conns" env:"HTTP_MAX_CONNS" default:"4096" help:"Most connections to the API, 1 to 1000000."`
	ConnsPerAddress   int      `name:"http-max-conns-per-address" env:"HTTP_MAX_CONNS_PER_ADDRESS" default:"-1" help:"Most connections to it from one address (of IPv6 a /64), -1 to 1000000; 0 for no limit, -1 for a quarter of --http-max-conns."`
	CORSOrigins       []string `name:"cors-origins" env:"CORS_ORIGINS" help:"Web origins whose pages may call, such as https://console.example, divided by commas."`
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
		return errors.New("--api-keys-file and --api-keys: set one of them")
	case some && f.NoAuth:
		return errors.New("--insecure-no-auth: credentials are set up as well; take one or the other away")
	case !some && !f.NoAuth:
		return errors.New("nobody could call: set --jwks, --api-keys-file or --tls-client-ca, or for development --insecure-no-auth (INSECURE_NO_AUTH=true)")
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
	if !(f.CallerRate >= 0 && f.CallerRate <= 1e6) { // also what is not a number
		return fmt.Errorf("--caller-rate: %v is not between 0 and 1000000", f.CallerRate)
	}
	for _, err := range []error{
		between("--caller-burst", f.CallerBurst, 1, math.MaxInt32),
		between("--caller-concurrency", f.CallerConcurrency, 0, math.MaxInt32),
		between("--read-max-bytes", f.ReadMaxBytes, 1<<10, 64<<20),
		between("--in-flight-max-bytes", f.InFlightMaxBytes, 0, 1<<40),
		between("--http-max-conns", f.HTTPMaxConns, 1, 1_000_000),
		between("--http-max-conns-per-address", f.ConnsPerAddress, -1, 1_000_000),
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
		TLS:     rpcserver.TLSFiles{Cert: f.TLSCert, Key: f.TLSKey, ClientCA: f.TLSClientCA, RequireClient: f.TLSRequire},
		Limit:   rpcserver.LimitConfig{Rate: f.CallerRate, Burst: f.CallerBurst, Concurrent: f.CallerConcurrency},
		Origins: f.CORSOrigins, ReadMaxBytes: f.ReadMaxBytes, InFlightBytes: f.InFlightMaxBytes, MaxConns: f.HTTPMaxConns, MaxConnsPerAddress: f.connsPerAddress(),
	}
}

// connsPerAddress is the setting in the terms of rpcserver.Config, where 0 is the default and less is no limit.
func (f *edgeFlags) connsPerAddress() int {
	switch f.ConnsPerAddress {
	case -1:
		return 0
	case 0:
		return -1
	}
	return f.ConnsPerAddress
}

// apiKeyCommand makes API keys. It needs no database: all that is kept of a key is a line of the configuration.
type apiKeyCommand struct {
	New newAPIKeyCommand `cmd:"" help:"Make an API key: the key for its owner, and the line to keep."`
}

type newAPIKeyCommand struct {
	ID    string   `arg:"" help:"Name of the caller: letters, digits, - and _."`
	Roles []string `arg:"" help:"Its roles, such as customer operator."`
}

func (c *newAPIKeyCommand) Run() error {
	key, line, err := auth.NewKey(c.ID, c.Roles)
	if err != nil {
		return err
	}
	fmt.Println("key: ", key, " (shown only now; send it as x-api-key)")
	fmt.Println("line:", line, " (into the file of --api-keys-file)")
	return nil
}
