//go:build probes

package main

import "example.com/shop/internal/app"

// domainFlags has no flags, so that the program under test needs none of the domain's settings. See
// internal/app/probes.go.
type domainFlags struct{}

// apply implements featureFlags.
func (f *domainFlags) apply(config *app.Config) error {
	config.Domain = new(app.DomainConfig)
	return nil
}
