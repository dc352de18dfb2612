//go:build probes

package app

import (
	"context"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/inbox"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// With the tag probes, the domain is two groups and a method without a schema. The program's tests need some domain,
// and a new service may have none.
func init() {
	defaultDomain = func(deps) (domain, error) {
		probes, others := inbox.NewGroup("probes"), inbox.NewGroup("others")
		inbox.Handle(probes, func(context.Context, pgx.Tx, *wrapperspb.StringValue) error { return nil })
		inbox.Handle(others, func(context.Context, pgx.Tx, *emptypb.Empty) error { return nil })
		return domain{
			register: func(s *connect.Server) {
				s.Register(connect.Method{Spec: connect.Spec{Procedure: "/probe.v1.Probe/Call"}})
			},
			groups: []group{{probes, 1}, {others, 1}},
		}, nil
	}
}
