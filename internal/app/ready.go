package app

import (
	"context"
	"errors"
	"sync/atomic"

	"example.com/shop/internal/ops"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
	"example.com/shop/internal/rpcserver"
	"example.com/shop/migrations"
)

// openReadiness opens the connection that readiness alone uses. Calls that wait for a lock, such as a migration's, may
// hold all others; readiness would then report the database away on every replica at once. The connection bypasses a
// pooler where a direct URL is known, since a pooler runs out in the same way.
func (p *process) openReadiness(ctx context.Context) (err error) {
	p.readyDB, err = postgres.Open(ctx, postgres.Config{
		URL: p.config.notifyURL(), MaxConns: 1, ApplicationName: ServiceName + " readiness of " + p.name,
	})
	return err
}

// databaseChecks are what every process needs of Postgres.
func (p *process) databaseChecks() []rpcserver.Check {
	return []rpcserver.Check{
		{Name: "database", Ready: p.checkDatabase()},
		{Name: "schema", Ready: p.checkSchema()},
		// Before its messages are refused for the time in their IDs.
		{Name: "clock", Ready: func(ctx context.Context) error { return ops.CheckClock(ctx, p.readyDB) }},
	}
}

// checkDatabase returns a check of the database: at first over the way that calls take, which may be set up wrongly, and from then on over
// readiness' own.
func (p *process) checkDatabase() func(context.Context) error {
	var reached atomic.Bool
	return func(ctx context.Context) error {
		if !reached.Load() {
			if err := p.db.Ping(ctx); err != nil {
				return err
			}
			reached.Store(true)
		}
		return p.readyDB.Ping(ctx)
	}
}

// checkSchema returns a check that this binary's migrations are applied. It asks no more once they are, so a lock on the
// table of versions makes no process less ready. Another check reports a database that does not answer.
func (p *process) checkSchema() func(context.Context) error {
	var applied atomic.Bool
	return func(ctx context.Context) error {
		if applied.Load() {
			return nil
		}
		err := postgres.Classify(migrations.Check(ctx, p.readyDB))
		if err == nil {
			applied.Store(true)
		}
		if errors.Is(err, postgres.ErrUnavailable) {
			return nil
		}
		return err
	}
}

// needBroker makes readiness depend on the broker, which is asked over one connection that is kept.
func (p *process) needBroker() {
	if p.broker != nil {
		return
	}
	p.broker = rabbit.NewGauge(p.config.AMQPURL, p.connectionName("readiness"))
	p.checks = append(p.checks, rpcserver.Check{
		Name: "broker", Ready: p.broker.Check,
		// Not for the API: it accepts calls while the broker is away, that is what the outbox is for.
		Services: []string{""},
	})
}

// needKeys makes readiness depend on the first keys of the token issuer, if nobody could call without them. With other credentials set up, an issuer
// that is away must not keep those out who do not need it; tokens are answered with unavailable meanwhile.
func (p *process) needKeys() {
	if p.edge.tokensOnly {
		p.checks = append(p.checks, rpcserver.Check{Name: "jwks", Ready: p.edge.keys.Ready})
	}
}

// consoleChecks are what the console needs: neither the broker, for it shows that the broker is away, nor the clock.
func (p *process) consoleChecks() (needed []rpcserver.Check) {
	for _, check := range p.checks {
		if check.Name != "broker" && check.Name != "clock" {
			needed = append(needed, check)
		}
	}
	return needed
}
