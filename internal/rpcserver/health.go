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

// Check checks a dependency of services.
type Check struct {
	// Name is the name in readiness answers, such as "database".
	Name string
	// Ready returns nil if the dependency is available. It is called at most once a second, never concurrently, and with a
	// deadline of 2 s, regardless of the number of probes and watchers. Its error is logged but never sent.
	Ready func(ctx context.Context) error
	// Services are the full names of the services that need the dependency. None means all. For example, a service that
	// only writes to the outbox does not need the broker.
	Services []string
}

const (
	// checkTimeout is shorter than the timeouts of common probes, so that they learn which check failed.
	checkTimeout = 2 * time.Second
	// checkCached is how long probes get the last result of a check. It makes the cost independent of their number.
	checkCached = time.Second
	// healthWatchInterval is how often a watcher's services are checked. Load balancers need no more.
	healthWatchInterval = time.Second
)

// health reports whether services are ready: as grpc.health.v1.Health on the API's port, and over HTTP on the
// operators' port.
type health struct {
	checks   []Check
	services []string
	log      *slog.Logger

	running singleflight.Group
	mu      sync.Mutex
	results map[string]result // by the name of a check
}

// result is the last result of a check.
type result struct {
	at  time.Time
	err error
}

func newHealth(checks []Check, log *slog.Logger) *health {
	return &health{checks: checks, log: log, results: make(map[string]result)}
}

// addServices adds the services of rpc.
func (h *health) addServices(rpc *connect.Server) {
	for spec := range rpc.Specs() {
		service, _, _ := strings.Cut(strings.TrimPrefix(spec.Procedure, "/"), "/")
		if !slices.Contains(h.services, service) {
			h.services = append(h.services, service)
		}
	}
}

// missingFor returns the names of the failed checks that the service needs. The service "" needs all checks.
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

// ready returns the result of the check from the last second, or else runs the check. Concurrent callers share one run.
func (h *health) ready(probe context.Context, check Check) error {
	if err, known := h.cached(check.Name); known {
		return err
	}
	answer := h.running.DoChan(check.Name, func() (any, error) {
		if err, known := h.cached(check.Name); known { // another run has just ended
			return nil, err
		}
		// The probe's cancellation does not count, because other probes wait for the answer, too.
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

func (h *health) cached(name string) (err error, known bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	last, found := h.results[name]
	return last.err, found && time.Since(last.at) < checkCached
}

// note stores the result of a check. If the result has changed, note logs it.
func (h *health) note(ctx context.Context, name string, err error) {
	h.mu.Lock()
	changed := (h.results[name].err != nil) != (err != nil)
	h.results[name] = result{time.Now(), err}
	h.mu.Unlock()
	switch {
	case changed && err != nil:
		h.log.WarnContext(ctx, "not ready", "check", name, "error", err)
	case changed:
		h.log.InfoContext(ctx, "ready again", "check", name)
	}
}

// draining reports whether the server that serves ctx is shutting down.
func draining(ctx context.Context) bool {
	shutdown, ok := ctx.Value(drainingKey{}).(context.Context)
	return ok && shutdown.Err() != nil
}

// readyz answers 200 or 503, with a body such as {"ready":false,"draining":false,"missing":["database"]}.
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
	_ = json.NewEncoder(w).Encode(answer) // fails only if the probe has left
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

// register adds grpc.health.v1.Health by hand. Connect has no generated code for grpc-go's health.proto, and a second
// copy of its messages would panic at startup.
func (h *health) register(rpc *connect.Server) {
	schema := healthv1.File_grpc_health_v1_health_proto.Services().ByName("Health")
	method := func(name protoreflect.Name, stream connect.StreamType, handler connect.ServerFunc) connect.Method {
		return connect.Method{Handler: handler, Spec: connect.Spec{
			StreamType: stream, Schema: schema.Methods().ByName(name),
			Procedure: "/" + string(schema.FullName()) + "/" + string(name),
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

// watch sends the status, and then each change until the caller leaves or the server drains.
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
