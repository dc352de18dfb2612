package app

import (
	"connectrpc.com/connect/v2"
	"example.com/shop/internal/console"
	"example.com/shop/internal/gen/ops/v1/opsv1connect"
)

// durableCallsInConsole lets operators list and cancel durable calls.
func durableCallsInConsole(p *process) feature {
	service := console.NewOperations(p.db, p.shared.durableCalls.Operations)
	return feature{operators: func(s *connect.Server) { opsv1connect.RegisterOperationsServiceHandler(s, service) }}
}
