//go:build unix

package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

func TestWithDatabase(t *testing.T) {
	t.Parallel()
	for _, given := range []string{
		"postgres://user:p%40ss@db.example:5433/shop",
		"postgresql://user:p%40ss@db.example:5433",
		"postgres://user:p%40ss@db.example:5433/shop?dbname=orders&sslmode=disable",
		"host=db.example port=5433 user=user password=p@ss dbname=orders",
	} {
		changed, err := withDatabase(given, "orders_demo_1")
		if err != nil {
			t.Errorf("%s: %v", given, err)
			continue
		}
		config, err := pgx.ParseConfig(changed)
		if err != nil {
			t.Errorf("%s: %v", changed, err)
			continue
		}
		got := fmt.Sprintf("%s at %s:%d with password %s", config.Database, config.Host, config.Port, config.Password)
		if want := "orders_demo_1 at db.example:5433 with password p@ss"; got != want {
			t.Errorf("%s: got %s, want %s", given, got, want)
		}
	}
}

func TestBadArgumentsAreOneLineWithoutPasswords(t *testing.T) {
	t.Parallel()
	valid := cli{PostgresURL: "postgres://u:secret@h/d", AMQPURL: "amqp://u:secret@h/", Orders: 3000, Rate: 160}
	if err := valid.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*cli){
		"no servers":   func(c *cli) { c.PostgresURL = "" },
		"postgres url": func(c *cli) { c.PostgresURL = "postgres://u:secret@h:port/d" },
		"amqp url":     func(c *cli) { c.AMQPURL = "http://u:secret@h/" },
		"amqps":        func(c *cli) { c.AMQPURL = "amqps://u:secret@h/" },
		"few orders":   func(c *cli) { c.Orders = 1 },
		"no rate":      func(c *cli) { c.Rate = -1 },
	} {
		flags := valid
		spoil(&flags)
		err := flags.Validate()
		if err == nil || strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: got %v", name, err)
		}
	}
}
