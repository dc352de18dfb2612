package rpcserver_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rpcserver"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

const (
	serving    = healthv1.HealthCheckResponse_SERVING
	notServing = healthv1.HealthCheckResponse_NOT_SERVING
)

// dependency is a dependency that a test can make unavailable.
type dependency struct{ away atomic.Bool }

func (d *dependency) ready(context.Context) error {
	if d.away.Load() {
		return errors.New("secret: dial db-1")
	}
	return nil
}

func TestHealthFollowsTheDependenciesOfEachService(t *testing.T) {
	t.Parallel()
	var database, broker dependency
	server := serve(t, rpcserver.Config{Checks: []rpcserver.Check{
		{Name: "database", Ready: database.ready},
		{Name: "broker", Ready: broker.ready, Services: []string{"other.v1.Other"}},
	}}, unary(echo))
	ops := opsPort(t, rpcserver.OpsConfig{Log: slog.New(slog.DiscardHandler), Checks: []rpcserver.Check{
		{Name: "database", Ready: database.ready},
		{Name: "broker", Ready: broker.ready, Services: []string{"other.v1.Other"}},
	}})
	client := healthv1.NewHealthClient(server.grpc(t))
	type status = healthv1.HealthCheckResponse_ServingStatus
	tests := []struct {
		name           string
		database       bool
		broker         bool
		overall, probe status
		code           int
		body           string
	}{
		{"all available", true, true, serving, serving, 200, `{"ready":true,"draining":false,"missing":[]}`},
		{"broker away", true, false, notServing, serving, 503,
			`{"ready":false,"draining":false,"missing":["broker"]}`},
		{"database away", false, true, notServing, notServing, 503,
			`{"ready":false,"draining":false,"missing":["database"]}`},
		{"both away", false, false, notServing, notServing, 503,
			`{"ready":false,"draining":false,"missing":["database","broker"]}`},
		{"both back", true, true, serving, serving, 200, `{"ready":true,"draining":false,"missing":[]}`},
	}
	for _, test := range tests {
		database.away.Store(!test.database)
		broker.away.Store(!test.broker)
		testenv.Eventually(t, 20*time.Second, func() error { // results are cached for a second
			for service, want := range map[string]status{"": test.overall, "probe.v1.Probe": test.probe} {
				res, err := client.Check(t.Context(), &healthv1.HealthCheckRequest{Service: service})
				if err != nil || res.GetStatus() != want {
					return fmt.Errorf("%s: service %q: got %s, %w, want %s", test.name, service, res.GetStatus(), err,
						want)
				}
			}
			if code, body := get(t, ops.url+"/readyz"); code != test.code || body != test.body {
				return fmt.Errorf("%s: /readyz: got %d %s, want %d %s", test.name, code, body, test.code, test.body)
			}
			return nil
		})
		if code, body := get(t, ops.url+"/healthz"); code != 200 || body != "ok" {
			t.Errorf("%s: /healthz: got %d %s", test.name, code, body)
		}
	}
	if n := strings.Count(server.logs.String(), `msg="not ready"`); n != 3 {
		t.Errorf("got %d log lines, want 3: the database failed once and the broker twice:\n%s", n, server.logs)
	}
}

// A check never runs concurrently, and runs at most once a second, regardless of the number of probes.
func TestProbesShareOneCheck(t *testing.T) {
	t.Parallel()
	const probes = 50
	entered, release := make(chan struct{}, probes), make(chan struct{})
	ops := opsPort(t, rpcserver.OpsConfig{Checks: []rpcserver.Check{{Name: "database",
		Ready: func(context.Context) error {
			entered <- struct{}{}
			<-release
			return nil
		}}}})
	var answered sync.WaitGroup
	probe := func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, ops.url+"/readyz", nil)
		if err != nil {
			return err
		}
		response, err := httpClient(t, false).Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return errors.New(response.Status)
		}
		return nil
	}
	leaves, leave := context.WithCancel(t.Context())
	answered.Go(func() { _ = probe(leaves) }) // its cancellation must not end the check that others wait for
	<-entered
	for range probes {
		answered.Go(func() {
			if err := probe(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	started := time.Now()
	leave()
	close(release)
	answered.Wait()
	if again, most := len(entered), int(time.Since(started)/time.Second); again > most {
		t.Errorf("the check ran %d more times, want at most %d", again, most)
	}
}

func TestHealthOfUnknownService(t *testing.T) {
	t.Parallel()
	client := healthv1.NewHealthClient(serve(t, rpcserver.Config{}, unary(echo)).grpc(t))
	_, err := client.Check(t.Context(), &healthv1.HealthCheckRequest{Service: "none"})
	if status.Code(err) != codes.NotFound {
		t.Errorf("Check: got error %v, want %s", err, codes.NotFound)
	}
	watch, err := client.Watch(t.Context(), &healthv1.HealthCheckRequest{Service: "none"})
	if err != nil {
		t.Fatal(err)
	}
	if res, err := watch.Recv(); err != nil || res.GetStatus() != healthv1.HealthCheckResponse_SERVICE_UNKNOWN {
		t.Errorf("Watch: got %s, %v", res.GetStatus(), err)
	}
	list, err := client.List(t.Context(), new(healthv1.HealthListRequest))
	if err != nil || list.GetStatuses()["probe.v1.Probe"].GetStatus() != serving {
		t.Errorf("List: got %v, %v", list, err)
	}
}

func TestHealthWatchSendsChanges(t *testing.T) {
	t.Parallel()
	var database dependency
	server := serve(t, rpcserver.Config{Checks: []rpcserver.Check{{Name: "database", Ready: database.ready}}},
		unary(echo))
	watch, err := healthv1.NewHealthClient(server.grpc(t)).Watch(t.Context(), new(healthv1.HealthCheckRequest))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []healthv1.HealthCheckResponse_ServingStatus{serving, notServing, serving} {
		database.away.Store(want == notServing)
		if res, err := watch.Recv(); err != nil || res.GetStatus() != want {
			t.Errorf("got %s, %v, want %s", res.GetStatus(), err, want)
		}
	}
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	res, err := httpClient(t, false).Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, strings.TrimSpace(string(body))
}
