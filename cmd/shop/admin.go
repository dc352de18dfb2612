package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"strings"
	"time"

	"example.com/shop/internal/app"
	"example.com/shop/internal/outbox"
)

// deskFlags are those of every operator's command. They print for people, or JSON.
type deskFlags struct {
	PostgresURL postgresURL `name:"postgres-url" env:"POSTGRES_URL" required:"" help:"Postgres to work on (URL or libpq keywords)."`
	JSON        bool        `name:"json" help:"Print JSON."`
}

// work runs fn at a desk on the database.
func (f *deskFlags) work(ctx context.Context, fn func(desk *app.Admin) error) error {
	return atDesk(ctx, app.Config{PostgresURL: string(f.PostgresURL)}, fn)
}

func atDesk(ctx context.Context, config app.Config, fn func(desk *app.Admin) error) error {
	desk, err := app.OpenAdmin(ctx, config)
	if err != nil {
		return err
	}
	defer desk.Close()
	return fn(desk)
}

// usageError is an argument that turns out to be wrong only when the command runs.
type usageError struct{ error }

func wrongUsage(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// moment is a time, or how long ago it was.
type moment struct{ time.Time }

var momentLayouts = []string{time.RFC3339, "2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02T15:04", "2006-01-02 15:04", time.DateOnly}

func (m *moment) UnmarshalText(text []byte) error {
	for _, layout := range momentLayouts {
		if at, err := time.ParseInLocation(layout, string(text), time.Local); err == nil {
			m.Time = at
			return nil
		}
	}
	ago, err := time.ParseDuration(string(text))
	if err != nil || ago < 0 {
		return fmt.Errorf("%q is neither a time, such as 2026-01-31T09:00:00Z or 2026-01-31, nor how long ago, such as 90m", text)
	}
	m.Time = time.Now().Add(-ago)
	return nil
}

// period is from when, and up to but without when.
type period struct {
	Since moment `help:"From this time on: 2026-01-31T09:00:00Z, 2026-01-31 (local time), or how long ago, such as 90m." placeholder:"TIME"`
	Until moment `help:"Before this time." placeholder:"TIME"`
}

func (p *period) check() error {
	if !p.Until.IsZero() && !p.Since.Before(p.Until.Time) {
		return fmt.Errorf("--until: %s is not after --since", p.Until.Format(time.RFC3339))
	}
	return nil
}

// place is how far a replay came, as SHARD:ID.
type place outbox.Place

func (p *place) UnmarshalText(text []byte) error {
	shard, id, _ := strings.Cut(string(text), ":")
	s, errShard := strconv.ParseInt(shard, 10, 16)
	i, errID := strconv.ParseInt(id, 10, 64)
	if errors.Join(errShard, errID) != nil || s < 0 || i < 0 {
		return fmt.Errorf("%q is not a place as a replay names it, such as 0:4711", text)
	}
	*p = place{Shard: int16(s), ID: i}
	return nil
}

func (p place) String() string { return fmt.Sprintf("%d:%d", p.Shard, p.ID) }

// person is who works here, for the audit log: the name given, or the one logged in with, or "".
func person(given string) string {
	if name := strings.TrimSpace(given); name != "" {
		return name
	}
	if name := os.Getenv("USER"); name != "" {
		return name
	}
	if login, err := user.Current(); err == nil {
		return login.Username
	}
	return ""
}
