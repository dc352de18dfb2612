package app

import (
	"context"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/rabbit"
)

// feature is a part of the core that a service can be made without. A field is nil if the feature has no such thing.
type feature struct {
	// register registers its services for callers, and operators those for operators.
	register, operators func(*connect.Server)
	// interceptor intercepts calls over any transport. It reads and writes the given headers.
	interceptor connect.ServerInterceptor
	headers     func() (request, response []string)
	// group is its consumer group.
	group *queueGroup
	// startAPI, startConsumer and startAll start its parts in the processes api, consumer and all; all also starts the
	// parts of the others.
	startAPI, startConsumer, startAll func(ctx context.Context)
	// permissions returns the permissions of its users of the broker.
	permissions func() map[string]rabbit.Permissions
}

// queueGroup is a consumer group with its queue.
type queueGroup struct {
	ops.Group
	queue rabbit.Queue
}

func (p *process) addFeatures() {
	for _, add := range features {
		p.features = append(p.features, add(p))
	}
}

// register registers every service for callers.
func (p *process) register(server *connect.Server) {
	p.domain.register(server)
	for _, f := range p.features {
		if f.register != nil {
			f.register(server)
		}
	}
}

// groups returns every consumer group: those of the domain, then those of the features.
func (p *process) groups() (groups []queueGroup) {
	for _, g := range p.domain.groups {
		queue := rabbit.Queue{Name: queueName(g), Types: g.Types()}
		groups = append(groups, queueGroup{ops.Group{Name: g.Name(), Types: g.Types()}, queue})
	}
	for _, f := range p.features {
		if f.group != nil {
			groups = append(groups, *f.group)
		}
	}
	return groups
}

// startFeatures starts the parts of all features that hook selects.
func (p *process) startFeatures(ctx context.Context, hook func(feature) func(context.Context)) {
	for _, f := range p.features {
		if start := hook(f); start != nil {
			start(ctx)
		}
	}
}

func (p *process) startAllFeatures(ctx context.Context) {
	p.startFeatures(ctx, func(f feature) func(context.Context) { return f.startAll })
}
