package main

import (
	"encoding/base64"
	"errors"

	"example.com/shop/internal/app"
	"github.com/alecthomas/kong"
)

// durableCallKeys are flags of the processes that accept or execute durable calls.
type durableCallKeys struct {
	CallKeys []signingKey `env:"CALL_KEYS" help:"${call_keys}"`
}

func (f *durableCallKeys) apply(config *app.Config) error {
	for _, key := range f.CallKeys {
		config.DurableCalls.Keys = append(config.DurableCalls.Keys, key)
	}
	return nil
}

// durableCallLimits are flags of the processes that execute durable calls.
type durableCallLimits struct {
	CallConcurrency int            `env:"CALL_CONCURRENCY" default:"0" help:"${call_concurrency}"`
	CallLimit       map[string]int `env:"CALL_LIMIT" placeholder:"METHOD=N" mapsep:"," help:"${call_limit}"`
}

func (f *durableCallLimits) apply(config *app.Config) error {
	config.DurableCalls.Concurrency, config.DurableCalls.Limits = f.CallConcurrency, f.CallLimit
	for method, limit := range f.CallLimit {
		if err := between("--call-limit "+method, limit, 1, 1000); err != nil {
			return err
		}
	}
	// A call that is executed may use two connections.
	return between("--call-concurrency", f.CallConcurrency, 0, int(config.MaxConns)/2)
}

// signingKey is a secret; its error does not show it.
type signingKey []byte

func (k *signingKey) UnmarshalText(text []byte) error {
	key, err := base64.StdEncoding.DecodeString(string(text))
	if err != nil || len(key) < 32 {
		return errors.New("not a base64 key of 32 bytes or more, as from `openssl rand -base64 32`")
	}
	*k = key
	return nil
}

var durableCallTexts = kong.Vars{
	"call_keys": "Keys that sign the callers of durable calls, the same for api and consumer: " +
		"base64 of 32 bytes or more, the newest first.",
	"call_concurrency": "Maximum durable calls executed at once, from 1 to half of the connections to Postgres; " +
		"0 for one less than half.",
	"call_limit": "The same for single methods, such as orders.v1.OrderService/SetStock=1.",
}
