package main

import (
	"fmt"
	"net"
	"time"
)

// listenAddress is HOST:PORT; the host may be empty for all interfaces.
type listenAddress string

func (a *listenAddress) UnmarshalText(text []byte) error {
	_, port, err := net.SplitHostPort(string(text))
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	if err != nil {
		return fmt.Errorf("%q is not an address to listen on, such as 127.0.0.1:8080 or :8080", text)
	}
	*a = listenAddress(text)
	return nil
}

// Validate is called by kong.
func (f *databaseFlags) Validate() error {
	return between("--max-conns", f.MaxConns, 2, 1000)
}

// Validate is called by kong.
func (f *relayFlags) Validate() error {
	if err := between("--page-rows", f.PageRows, 1, 5000); err != nil {
		return err
	}
	if err := between("--lease", f.Lease, time.Second, 5*time.Minute); err != nil {
		return err
	}
	return between("--poll-interval", f.PollInterval, 10*time.Millisecond, time.Minute)
}

// Validate is called by kong.
func (f *consumerFlags) Validate() error {
	if err := between("--prefetch", f.Prefetch, 1, 10_000); err != nil {
		return err
	}
	return between("--batch", f.Batch, 1, 1000)
}

func between[N int | int32 | time.Duration](flag string, value, least, most N) error {
	if value < least || value > most {
		return fmt.Errorf("%s: %v is not between %v and %v", flag, value, least, most)
	}
	return nil
}
