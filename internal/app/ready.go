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
// hold all others; readiness would then report the database as down on every replica at once. The connection bypasses a
// pooler where a direct URL is known, since a pooler runs out in the same way.
func (p *process) openReadiness(ctx context.Context) (err error) {
	p.readyDB, err = postgres.Open(ctx, postgres.Config{
		URL: p.config.notifyURL(), MaxConns: 1, ApplicationName: ServiceName + " readiness of " + p.name,
	})
	return err
}

// databaseChecks returns the readiness checks of Postgres, which every process needs.
func (p *process) databaseChecks() []rpcserver.Check {
	return []rpcserver.Check{
		{Name: "database", Ready: p.checkDatabase()},
		{Name: "schema", Ready: p.checkSchema()},
		// A wrong clock shows here before Postgres refuses messages for the time in their IDs.
		{Name: "clock", Ready: func(ctx context.Context) error { return ops.CheckClock(ctx, p.readyDB) }},
	}
}

// checkDatabase returns a check of the database. Until it has succeeded once it uses the pool of calls, which may be
// misconfigured; then it uses the connection for readiness.
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

// checkSchema returns a check that the schema fits this binary. Once it does, the check queries no more, so a lock on
// the version tables does not affect readiness. The check "database" reports an unavailable database.
func (p *process) checkSchema() func(context.Context) error {
	var fits atomic.Bool
	return func(ctx context.Context) error {
		if fits.Load() {
			return nil
		}
		err := postgres.Classify(migrations.Check(ctx, p.readyDB))
		if err == nil {
			fits.Store(true)
		}
		if errors.Is(err, postgres.ErrUnavailable) {
			return nil
		}
		return err
	}
}

// needBroker makes readiness depend on the broker, which it checks over one permanent connection.
func (p *process) needBroker() {
	if p.broker != nil {
		return
	}
	p.broker = rabbit.NewGauge(p.config.AMQPURL, p.connectionName("readiness"))
	p.checks = append(p.checks, rpcserver.Check{
		Name: "broker", Ready: p.broker.Check,
		// Not for the API: thanks to the outbox it accepts calls while the broker is unavailable.
		Services: []string{""},
	})
}

// needKeys makes readiness depend on the first keys of the token issuer if tokens are the only credentials. Otherwise
// an unavailable issuer must not block callers with other credentials; calls with tokens fail with unavailable
// meanwhile.
func (p *process) needKeys() {
	if p.edge.tokensOnly {
		p.checks = append(p.checks, rpcserver.Check{Name: "jwks", Ready: p.edge.keys.Ready})
	}
}
