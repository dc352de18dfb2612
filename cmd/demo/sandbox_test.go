//go:build unix

package main

import (
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
		if config.Database != "orders_demo_1" || config.Host != "db.example" || config.Port != 5433 || config.Password != "p@ss" {
			t.Errorf("%s: got %s at %s:%d with password %s", given, config.Database, config.Host, config.Port, config.Password)
		}
	}
}

func TestBadArgumentsAreOneLineWithoutPasswords(t *testing.T) {
	t.Parallel()
	fine := cli{PostgresURL: "postgres://u:secret@h/d", AMQPURL: "amqp://u:secret@h/", Orders: 3000, Rate: 160}
	if err := fine.Validate(); err != nil {
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
		one := fine
		spoil(&one)
		err := one.Validate()
		if err == nil || strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: got %v", name, err)
		}
	}
}
