package rpcserver

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"golang.org/x/sync/singleflight"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Check is one thing that services need to do their work.
type Check struct {
	// Name is what readiness answers call it, such as "database".
	Name string
	// Ready returns nil if it is there. It is called once a second at most, never twice at the same time, and with a
	// deadline of 2 s, however many probes and watchers ask. Its error is logged, never sent.
	Ready func(ctx context.Context) error
	// Services are the full names of those that need it; none means all. A service that only writes to the outbox does
	// not need the broker.
	Services []string
}

const (
	// checkTimeout is shorter than the timeouts of common probes, so that they hear which check failed.
	checkTimeout = 2 * time.Second
	// checkRemembered is how long probes get what a check found last, so that they cost the same however many come.
	checkRemembered = time.Second
	// healthWatchInterval is how often a watcher's services are checked: load balancers need no more.
	healthWatchInterval = time.Second
)

// health answers whether services are ready: over grpc.health.v1.Health on the API's port, and over HTTP on the operators' port.
type health struct {
	checks   []Check
	services []string
	log      *slog.Logger

	running singleflight.Group
	mu      sync.Mutex
	found   map[string]finding // by the name of a check
}

// finding is what a check said when it was last asked.
type finding struct {
	at  time.Time
	err error
}

func newHealth(checks []Check, log *slog.Logger) *health {
	return &health{checks: checks, log: log, found: make(map[string]finding)}
}

// serves learns which services there are.
func (h *health) serves(rpc *connect.Server) {
	for spec := range rpc.Specs() {
		service, _, _ := strings.Cut(strings.TrimPrefix(spec.Procedure, "/"), "/")
		if !slices.Contains(h.services, service) {
			h.services = append(h.services, service)
		}
	}
}

// missingFor returns the names of failed checks that the service needs; "" needs all of them.
func (h *health) missingFor(probe context.Context, service string) []string {
	failed := make([]string, len(h.checks))
	var running sync.WaitGroup
	for i, check := range h.checks {
		if service != "" && len(check.Services) > 0 && !slices.Contains(check.Services, service) {
			continue
		}
		running.Go(func() {
			if err := h.ready(probe, check); err != nil {
				failed[i] = check.Name
			}
		})
	}
	running.Wait()
	return slices.DeleteFunc(failed, func(name string) bool { return name == "" })
}

// ready returns what the check found within the last second, or else what it finds now, which all who ask meanwhile wait for.
func (h *health) ready(probe context.Context, check Check) error {
	if err, known := h.remembered(check.Name); known {
		return err
	}
	answer := h.running.DoChan(check.Name, func() (any, error) {
		if err, known := h.remembered(check.Name); known { // since this probe looked
			return nil, err
		}
		// Without the probe's end: others wait for the answer as well.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(probe), checkTimeout)
		defer cancel()
		err := check.Ready(ctx)
		h.note(ctx, check.Name, err)
		return nil, err
	})
	select {
	case result := <-answer:
		return result.Err
	case <-probe.Done():
		return probe.Err()
	}
}

func (h *health) remembered(name string) (err error, known bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	last, asked := h.found[name]
	return last.err, asked && time.Since(last.at) < checkRemembered
}

// note remembers what a check found, and logs that it fails or works again.
func (h *health) note(ctx context.Context, name string, err error) {
	h.mu.Lock()
	changed := (h.found[name].err != nil) != (err != nil)
	h.found[name] = finding{time.Now(), err}
	h.mu.Unlock()
	switch {
	case changed && err != nil:
		h.log.WarnContext(ctx, "not ready", "check", name, "error", err)
	case changed:
		h.log.InfoContext(ctx, "ready again", "check", name)
	}
}

// draining tells whether the server that serves ctx is shutting down.
func draining(ctx context.Context) bool {
	shutdown, ok := ctx.Value(drainingKey{}).(context.Context)
	return ok && shutdown.Err() != nil
}

// readyz answers 200 or 503 and {"ready":false,"draining":false,"missing":["database"]}.
func (h *health) readyz(w http.ResponseWriter, r *http.Request) {
	answer := struct {
		Ready    bool     `json:"ready"`
		Draining bool     `json:"draining"`
		Missing  []string `json:"missing"`
	}{Draining: draining(r.Context()), Missing: h.missingFor(r.Context(), "")}
	answer.Ready = !answer.Draining && len(answer.Missing) == 0
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	if !answer.Ready {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(answer) // fails only when the prober has left
}

func (h *health) status(ctx context.Context, service string) healthv1.HealthCheckResponse_ServingStatus {
	switch {
	case service != "" && !slices.Contains(h.services, service):
		return healthv1.HealthCheckResponse_SERVICE_UNKNOWN
	case draining(ctx) || len(h.missingFor(ctx, service)) > 0:
		return healthv1.HealthCheckResponse_NOT_SERVING
	}
	return healthv1.HealthCheckResponse_SERVING
}

// register adds grpc.health.v1.Health by hand: Connect has no generated code for grpc-go's health.proto, and a second copy
// of its messages would panic at start-up.
func (h *health) register(rpc *connect.Server) {
	schema := healthv1.File_grpc_health_v1_health_proto.Services().ByName("Health")
	method := func(name protoreflect.Name, stream connect.StreamType, handler connect.ServerFunc) connect.Method {
		return connect.Method{Handler: handler, Spec: connect.Spec{
			StreamType: stream, Schema: schema.Methods().ByName(name), Procedure: "/" + string(schema.FullName()) + "/" + string(name),
		}}
	}
	h.services = append(h.services, string(schema.FullName()))
	rpc.Register(
		method("Check", connect.StreamTypeUnary, h.check),
		method("List", connect.StreamTypeUnary, h.list),
		method("Watch", connect.StreamTypeServer, h.watch),
	)
}

func (h *health) check(ctx context.Context, _ connect.Spec, stream connect.ServerStream) error {
	var req healthv1.HealthCheckRequest
	if err := stream.Receive(&req); err != nil {
		return err
	}
	status := h.status(ctx, req.GetService())
	if status == healthv1.HealthCheckResponse_SERVICE_UNKNOWN {
		return connect.NewError(connect.CodeNotFound, "unknown service")
	}
	return stream.Send(&healthv1.HealthCheckResponse{Status: status})
}

func (h *health) list(ctx context.Context, _ connect.Spec, stream connect.ServerStream) error {
	var req healthv1.HealthListRequest
	if err := stream.Receive(&req); err != nil {
		return err
	}
	res := &healthv1.HealthListResponse{Statuses: make(map[string]*healthv1.HealthCheckResponse)}
	for _, service := range append([]string{""}, h.services...) {
		res.Statuses[service] = &healthv1.HealthCheckResponse{Status: h.status(ctx, service)}
	}
	return stream.Send(res)
}

// watch sends the status and then each change, until the caller leaves or the server drains.
func (h *health) watch(ctx context.Context, _ connect.Spec, stream connect.ServerStream) error {
	var req healthv1.HealthCheckRequest
	if err := stream.Receive(&req); err != nil {
		return err
	}
	sent := healthv1.HealthCheckResponse_UNKNOWN
	for {
		if status := h.status(ctx, req.GetService()); status != sent {
			if err := stream.Send(&healthv1.HealthCheckResponse{Status: status}); err != nil {
				return err
			}
			sent = status
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(healthWatchInterval):
		}
	}
}
