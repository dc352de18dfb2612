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

// adminFlags are the flags of every operator's command.
type adminFlags struct {
	PostgresURL postgresURL `name:"postgres-url" env:"POSTGRES_URL" required:"" help:"Postgres URL or libpq keywords."`
	JSON        bool        `name:"json" help:"Print JSON."`
}

// withAdmin runs fn with an Admin of the database, if this binary can work with its schema.
func (f *adminFlags) withAdmin(ctx context.Context, fn func(admin *app.Admin) error) error {
	config := app.Config{PostgresURL: string(f.PostgresURL)}
	return withAnySchema(ctx, config, func(admin *app.Admin) error {
		if err := admin.CheckSchema(ctx); err != nil {
			return err
		}
		return fn(admin)
	})
}

// withAnySchema runs fn with an Admin of a database whose schema may not fit this binary.
func withAnySchema(ctx context.Context, config app.Config, fn func(admin *app.Admin) error) error {
	admin, err := app.OpenAdmin(ctx, config)
	if err != nil {
		return err
	}
	defer admin.Close()
	return fn(admin)
}

// usageError is a wrong argument that only a running command can detect.
type usageError struct{ error }

func usageErrorf(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// moment is a time, given as such or as an age.
type moment struct{ time.Time }

var momentLayouts = []string{
	time.RFC3339, "2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02T15:04", "2006-01-02 15:04", time.DateOnly,
}

func (m *moment) UnmarshalText(text []byte) error {
	for _, layout := range momentLayouts {
		if at, err := time.ParseInLocation(layout, string(text), time.Local); err == nil {
			m.Time = at
			return nil
		}
	}
	ago, err := time.ParseDuration(string(text))
	if err != nil || ago < 0 {
		return fmt.Errorf("%q is neither a time, such as 2026-01-31T09:00:00Z or 2026-01-31, nor an age, such as 90m",
			text)
	}
	m.Time = time.Now().Add(-ago)
	return nil
}

// period is a time range that includes Since and excludes Until.
type period struct {
	Since moment `help:"${since}" placeholder:"TIME"`
	Until moment `help:"End time, exclusive." placeholder:"TIME"`
}

func (p *period) check() error {
	if !p.Until.IsZero() && !p.Since.Before(p.Until.Time) {
		return fmt.Errorf("--until: %s is not after --since", p.Until.Format(time.RFC3339))
	}
	return nil
}

// place is the progress of a replay, written as SHARD:ID.
type place outbox.Place

func (p *place) UnmarshalText(text []byte) error {
	shard, id, _ := strings.Cut(string(text), ":")
	s, errShard := strconv.ParseInt(shard, 10, 16)
	i, errID := strconv.ParseInt(id, 10, 64)
	if errors.Join(errShard, errID) != nil || s < 0 || i < 0 {
		return fmt.Errorf("%q is not a SHARD:ID as a replay prints it, such as 0:4711", text)
	}
	*p = place{Shard: int16(s), ID: i}
	return nil
}

func (p place) String() string { return fmt.Sprintf("%d:%d", p.Shard, p.ID) }

// actorName returns the given name for the audit log, else the login name, else "".
func actorName(given string) string {
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
