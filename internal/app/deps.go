package app

import (
	"fmt"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/changes"
	"example.com/shop/internal/clients"
	"example.com/shop/internal/outbox"
	"github.com/jackc/pgx/v5/pgxpool"
)

// deps is what newDomain gets from the core.
type deps struct {
	// config is the domain's own configuration.
	config DomainConfig
	// namesOnly means that the process only needs the names of the services and groups, as the relay and operators'
	// commands do. It calls no method and runs no handler. config is zero, and db and out may be nil, so open nothing and
	// return no error.
	namesOnly bool

	db *pgxpool.Pool
	// out writes messages in transactions.
	out *outbox.Writer
	// changes notifies watchers of changes.
	changes *changes.Hub

	process *process // for the clients
}

// client returns a client of another service over HTTP, such as http://billing:8080. See clients.HTTP. The process
// closes it after the domain.
//
//	billing, err := d.client(d.config.BillingURL, clients.Config{APIKey: d.config.BillingKey})
//	if err != nil {
//		return domain{}, fmt.Errorf("billing: %w", err)
//	}
//	invoices := invoicesv1connect.NewInvoiceServiceClient(billing)
func (d deps) client(url string, config clients.Config) (*connect.Client, error) {
	if d.namesOnly {
		url = "http://unused"
	}
	client, done, err := clients.HTTP(url, d.measured(config))
	if err == nil {
		d.process.closers = append(d.process.closers, done)
	}
	return client, err
}

// measured returns the config of a client whose calls are measured and traced like the rest of the process.
func (d deps) measured(config clients.Config) clients.Config {
	if providers := d.process.telemetry; providers != nil {
		config.MeterProvider, config.TracerProvider = providers.Meter, providers.Tracer
	}
	return config
}

// compose makes the domain and the features.
func (p *process) compose() (err error) {
	if p.config.domain == nil {
		p.config.domain = defaultDomain
	}
	d := deps{namesOnly: p.config.Domain == nil, db: p.db, out: p.out, changes: p.changes, process: p}
	if !d.namesOnly {
		d.config = *p.config.Domain
	}
	if p.domain, err = p.config.domain(d); err != nil {
		p.closeDomain()
		return fmt.Errorf("make the domain: %w", err)
	}
	p.addFeatures()
	p.publishes = p.packages()
	return nil
}

// closeDomain closes what newDomain opened, and then its clients.
func (p *process) closeDomain() {
	if p.domain.close != nil {
		p.domain.close()
	}
	for _, done := range p.closers {
		done()
	}
}

// declared returns a process that tells what the service consists of. It handles no message and serves no call.
func declared(config Config) (*process, error) {
	config.Domain = nil
	p := &process{config: config, changes: changes.New(changes.Config{})}
	if err := p.compose(); err != nil {
		return nil, err
	}
	p.closeDomain()
	return p, nil
}
