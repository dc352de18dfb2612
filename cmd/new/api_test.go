//go:build new

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// consumer is the domain of a service that handles the template's events and calls its API.
const consumer = `package app

import (
	"context"
	"fmt"

	"connectrpc.com/connect/v2"
	"github.com/acme/billing/internal/clients"
	ordersv1 "github.com/acme/billing/internal/gen/orders/v1"
	"github.com/acme/billing/internal/gen/orders/v1/ordersv1connect"
	"github.com/acme/billing/internal/inbox"
	"github.com/jackc/pgx/v5"
)

const ServiceName = "billing"

type DomainConfig struct {
	OrdersURL string ${QUOTE}env:"ORDERS_URL" required:"" help:"URL of the service of orders."${QUOTE}
}

type domain struct {
	register func(*connect.Server)
	groups   []group
	close    func()
}

type group struct {
	*inbox.Group
	lanes int
}

func newDomain(d deps) (domain, error) {
	shop, err := d.client(d.config.OrdersURL, clients.Config{})
	if err != nil {
		return domain{}, fmt.Errorf("ORDERS_URL: %w", err)
	}
	orders := ordersv1connect.NewOrderServiceClient(shop)
	charges := inbox.NewGroup("charges")
	inbox.Handle(charges, func(ctx context.Context, _ pgx.Tx, placed *ordersv1.OrderPlaced) error {
		_, err := orders.GetOrder(ctx, &ordersv1.GetOrderRequest{OrderId: placed.GetOrderId()})
		return err
	})
	return domain{register: func(*connect.Server) {}, groups: []group{{charges, 1}}}, nil
}
`

// A service imports the API of another one from a folder or from git, and one handler takes the other's events. The
// program starts: nothing is registered twice.
func TestMadeUsesAnotherService(t *testing.T) {
	template := checkout(t)
	s := &shell{t: t, dir: copied(t, "-bare", "billing"), env: environment()}
	domain := strings.ReplaceAll(consumer, "${QUOTE}", "`")
	if err := os.WriteFile(filepath.Join(s.dir, "internal/app/domain.go"), []byte(domain), 0o644); err != nil {
		t.Fatal(err)
	}
	s.run("bash scripts/packages.sh tools")
	s.run("bash scripts/import_api.sh " + template + "/.git#branch=main,subdir=proto && rm -r apis")
	s.run("bash scripts/import_api.sh " + template + "/proto && bash scripts/import_api.sh " + template + "/proto")
	copies := s.run("find apis -name '*.proto'")
	if !strings.Contains(copies, "apis/orders/v1/events.proto") || strings.Contains(copies, "auth") ||
		strings.Contains(copies, "ops/v1") {
		t.Errorf("imported %s", copies)
	}
	s.run("tools/node_modules/.bin/buf generate && tools/node_modules/.bin/buf lint")
	if topology := s.run("go run ./cmd/billing topology"); !strings.Contains(topology,
		"queue    billing.charges for orders.v1.OrderPlaced") {
		t.Errorf("the topology is %s", topology)
	}
	missing := s.run("go run ./cmd/billing api --postgres-url=postgres://h/d --insecure-no-auth 2>&1 || true")
	if !strings.Contains(missing, "ORDERS_URL") && !strings.Contains(missing, "--orders-url") {
		t.Errorf("without its setting: %s", missing)
	}
	s.run("go test -count=1 -run Dependencies ./internal/dev/architecture")

	// A package of the same name is not overwritten.
	s.run("mkdir -p proto/orders/v1 && cp apis/orders/v1/events.proto apis/orders/v1/orders.proto proto/orders/v1/")
	refused := s.run("bash scripts/import_api.sh " + template + "/proto 2>&1 || true")
	if !strings.Contains(refused, "has a package proto/orders/v1, too") {
		t.Errorf("an import over the service's own package: %s", refused)
	}
}
