package session

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/jackc/pgx/v5"
)

// IsPooled reports whether connections go to a pooler in transaction mode, where sessions keep nothing: no settings, no
// LISTEN, no prepared statements. The URL of such a pooler asks pgx for a query mode that prepares no statements.
func IsPooled(config *pgx.ConnConfig) bool {
	return config.DefaultQueryExecMode != pgx.QueryExecModeCacheStatement
}

// Connect opens one connection outside any pool. The caller closes it.
func Connect(ctx context.Context, url string) (*pgx.Conn, error) {
	parsed, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("parse postgres url: %w", err)
	}
	if _, err := Pin(parsed, Options{Pooled: IsPooled(parsed)}); err != nil {
		return nil, err
	}
	parsed.ConnectTimeout = ConnectTimeout
	parsed.DialFunc = Dial
	return pgx.ConnectConfig(ctx, parsed)
}

// ConnectTimeout bounds one attempt to connect, so that an unreachable host fails instead of hanging.
const ConnectTimeout = 5 * time.Second

// silence is how long a server may acknowledge nothing before its connection counts as broken. Linux' own timeouts need
// a quarter of an hour to notice a host that vanished.
const silence = 15 * time.Second

// Dial opens connections that notice when the peer is gone.
func Dial(ctx context.Context, network, address string) (net.Conn, error) {
	dialer := net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: silence / 3, Interval: silence / 3, Count: 2},
		Control:         limitSilence,
	}
	return dialer.DialContext(ctx, network, address)
}

// Listen calls hear for every notification on a channel of the database at url, until ctx is done. It also calls
// hear("") each time it starts to listen, because notifications of the time before are lost. The connection must be
// direct: a pooler in transaction mode drops LISTEN without an error.
func Listen(ctx context.Context, url, channel string, hear func(payload string)) {
	Keep(ctx, url, "listen on "+channel, func(conn *pgx.Conn) error {
		if _, err := conn.Exec(ctx, "LISTEN "+pgx.Identifier{channel}.Sanitize()); err != nil {
			return err
		}
		hear("")
		for {
			news, err := conn.WaitForNotification(ctx)
			if err != nil {
				return err
			}
			hear(news.Payload)
		}
	})
}

// Keep calls fn with a connection of its own, again and again with backoff, until ctx is done. Use it for hints, whose
// loss costs only latency: it logs failures and retries.
func Keep(ctx context.Context, url, purpose string, fn func(conn *pgx.Conn) error) {
	pause := backoff.NewExponentialBackOff()
	pause.MaxInterval = 10 * time.Second
	for ctx.Err() == nil {
		started := time.Now()
		err := With(ctx, url, fn)
		if ctx.Err() != nil {
			return
		}
		if time.Since(started) > pause.MaxInterval {
			pause.Reset()
		}
		slog.WarnContext(ctx, "doorbell connection lost, polling meanwhile", "purpose", purpose, "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(pause.NextBackOff()):
		}
	}
}

// With calls fn with a connection and closes it afterwards.
func With(ctx context.Context, url string, fn func(conn *pgx.Conn) error) error {
	conn, err := Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx)) // bounded by pgx itself
	return fn(conn)
}
