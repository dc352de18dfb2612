package postgres

import (
	"context"
	"log/slog"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/jackc/pgx/v5"
)

// Listen calls hear for every notification on a channel of the database at url, until ctx is done; and with "" whenever it has begun to listen, for
// whatever was said while nobody did. The connection must be a direct one: a transaction-mode pooler drops LISTEN silently.
func Listen(ctx context.Context, url, channel string, hear func(payload string)) {
	KeepConnected(ctx, url, "listen on "+channel, func(conn *pgx.Conn) error {
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

// KeepConnected calls fn with a connection of its own, again and again with backoff, until ctx is done. It is for hints, whose loss costs
// latency and nothing else: failures are logged.
func KeepConnected(ctx context.Context, url, purpose string, fn func(conn *pgx.Conn) error) {
	pause := backoff.NewExponentialBackOff()
	pause.MaxInterval = 10 * time.Second
	for ctx.Err() == nil {
		started := time.Now()
		err := WithConnection(ctx, url, fn)
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

// WithConnection calls fn with a connection that is closed afterwards.
func WithConnection(ctx context.Context, url string, fn func(conn *pgx.Conn) error) error {
	conn, err := Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx)) // bounded by pgx itself
	return fn(conn)
}
