//go:build !probes

package main

import "example.com/shop/internal/app"

// domainFlags are the domain's own flags, of the processes that serve calls or handle messages.
type domainFlags struct {
	Domain app.DomainConfig `embed:""`
}

// apply implements featureFlags.
func (f *domainFlags) apply(config *app.Config) error {
	config.Domain = &f.Domain
	if checked, ok := any(f.Domain).(interface{ Validate() error }); ok {
		return checked.Validate()
	}
	return nil
}
