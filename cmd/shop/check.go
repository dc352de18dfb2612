package main

import (
	"cmp"
	"fmt"
	"math"
	"net"
	"strings"
	"time"

	"example.com/shop/internal/app"
	"example.com/shop/internal/outbox"
)

// listenAddress is HOST:PORT; the host may be empty for all interfaces.
type listenAddress string

func (a *listenAddress) UnmarshalText(text []byte) error {
	_, port, err := net.SplitHostPort(string(text))
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	if err != nil {
		return fmt.Errorf("%q is not a listen address, such as 127.0.0.1:8080 or :8080", text)
	}
	*a = listenAddress(text)
	return nil
}

func (f *databaseFlags) check() error {
	// One for a call of a message, one for a call that is retried, and one for what the first call reads.
	return between("--max-conns", f.MaxConns, 3, 1000)
}

func (f *brokerFlags) check() error {
	if f.Exchange == "" || len(f.Exchange) > 255 || strings.HasPrefix(f.Exchange, "amq.") {
		return fmt.Errorf("--exchange: %q must have 1 to 255 bytes, without the reserved prefix amq", f.Exchange)
	}
	return nil
}

func (f *relayFlags) check() error {
	if err := between("--page-rows", f.PageRows, 1, 5000); err != nil {
		return err
	}
	if err := between("--lease", f.Lease, time.Second, 5*time.Minute); err != nil {
		return err
	}
	if err := between("--poll-interval", f.PollInterval, 10*time.Millisecond, time.Minute); err != nil {
		return err
	}
	return between("--retention", f.Retention, time.Minute, outbox.MaxRetention)
}

func (f *apiFlags) check() error {
	if err := between("--max-backlog", f.MaxBacklog, 0, math.MaxInt64); err != nil {
		return err
	}
	return between("--max-backlog-age", f.MaxBacklogAge, 0, 365*24*time.Hour)
}

func (f *consumerFlags) check() error {
	return cmp.Or(between("--prefetch", f.Prefetch, 1, 10_000), between("--batch", f.Batch, 1, 1000))
}

// kong calls Validate of commands only, so each command checks the flags that it embeds.

func (c *apiCommand) Validate() error {
	if c.PostgresURL == "" {
		return nil // kong names all missing flags, but only if nothing else is wrong
	}
	_, err := c.config()
	return err
}

func (c *relayCommand) Validate() error {
	_, err := c.config()
	return err
}

func (c *runConsumersCommand) Validate() error {
	_, err := c.config()
	return err
}

func (c *allCommand) Validate() error {
	if c.PostgresURL == "" || c.AMQPURL == "" {
		return nil
	}
	_, err := c.config()
	return err
}

// checked returns config with the features, or the first error only, so that it is one line.
func checked(config app.Config, features []featureFlags, flags ...interface{ check() error }) (app.Config, error) {
	for _, f := range flags {
		if err := f.check(); err != nil {
			return app.Config{}, err
		}
	}
	for _, f := range features {
		if err := f.apply(&config); err != nil {
			return app.Config{}, err
		}
	}
	return config, nil
}

func between[N int | int32 | int64 | float64 | time.Duration](flag string, value, least, most N) error {
	if !(value >= least && value <= most) { // also catches NaN
		return fmt.Errorf("%s: %v is not between %v and %v", flag, value, least, most)
	}
	return nil
}
