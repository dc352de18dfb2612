package app

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/console"
	"example.com/shop/internal/dev/testenv"
	opsv1 "example.com/shop/internal/gen/ops/v1"
	"example.com/shop/internal/gen/ops/v1/opsv1connect"
	"example.com/shop/internal/rabbit"
	"example.com/shop/internal/rpcserver"
	"example.com/shop/internal/telemetry"
)

func init() { processes["Console"] = tested{run: RunConsole, takesCalls: true} }

// Every procedure of the console declares its callers: observers read, operators read and act, and all others are
// refused.
func TestConsoleAccess(t *testing.T) {
	t.Parallel()
	keys, lines := apiKeys(t, "stranger", "observer", "operator")
	config := probed(Config{PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t), Edge: Edge{APIKeys: lines}})
	served := start(t, RunConsole, config)
	await(t, "console", served.ready, http.StatusOK)
	url := served.url
	acts := 0
	transport := connecthttp.NewTransport(newHTTPClient(t, true), url)
	for spec := range consoleServer(t).Specs() {
		access := auth.AccessTo(spec)
		reads := spec.IdempotencyLevel == connect.IdempotencyNoSideEffects ||
			strings.HasSuffix(spec.Procedure, "/WatchFlow")
		if !reads && strings.HasPrefix(spec.Procedure, "/ops.") {
			if acts++; len(access.GetRoles()) != 1 || access.GetRoles()[0] != "operator" {
				t.Errorf("%s acts, and is open to %v", spec.Procedure, access)
			}
		}
		for _, role := range []string{"", "stranger", "observer", "operator"} {
			header := map[string]string{}
			if role != "" {
				header["x-api-key"] = keys[role]
			}
			code := codeOf(t, transport, spec, header)
			denied := code == connect.CodeUnauthenticated || code == connect.CodePermissionDenied
			if want := wantCode(access, role); want == 0 && denied || want != 0 && code != want {
				t.Errorf("%q calls %s: %s, want %s", role, spec.Procedure, code, want)
			}
		}
	}
	if acts < 6 {
		t.Errorf("only %d procedures act", acts)
	}
}

// No role may call both the API and the console.
func TestRolesOfTheConsoleAreItsOwn(t *testing.T) {
	t.Parallel()
	roles := map[string]bool{}
	for spec := range consoleServer(t).Specs() {
		if strings.HasPrefix(spec.Procedure, "/ops.") {
			for _, role := range auth.AccessTo(spec).GetRoles() {
				roles[role] = true
			}
		}
	}
	if len(roles) == 0 {
		t.Fatal("found no roles")
	}
	for spec := range startAPI(t, Edge{}).server.Specs() {
		for _, role := range auth.AccessTo(spec).GetRoles() {
			if roles[role] {
				t.Errorf("%s is open to %s, which is a role of the console", spec.Procedure, role)
			}
		}
	}
}

// consoleServer returns a server with the console's procedures that serves no calls.
func consoleServer(t *testing.T) *rpcserver.Server {
	t.Helper()
	edge, err := newEdge(Edge{})
	if err != nil {
		t.Fatal(err)
	}
	p := names(t, probed(Config{}))
	p.edge, p.telemetry = edge, new(telemetry.Providers)
	return p.newConsoleServer(console.New(console.Config{}))
}

// Pages of other origins cannot call the console, not even with DNS rebinding.
func TestConsoleRefusesOtherOrigins(t *testing.T) {
	t.Parallel()
	config := probed(Config{
		PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t),
		Edge: Edge{NoAuth: true, Origins: []string{"https://api.example"}},
	})
	served := start(t, RunConsole, config)
	await(t, "console", served.ready, http.StatusOK)
	url := served.url + opsv1connect.OpsServiceGetSessionProcedure
	for name, test := range map[string]struct {
		host   string
		header map[string]string
		want   int
	}{
		"Own":         {"", map[string]string{"Origin": served.url, "Sec-Fetch-Site": "same-origin"}, http.StatusOK},
		"Command":     {"", nil, http.StatusOK},
		"OtherSite":   {"", map[string]string{"Sec-Fetch-Site": "cross-site"}, http.StatusForbidden},
		"OtherOrigin": {"", map[string]string{"Origin": "https://evil.example"}, http.StatusForbidden},
		"OriginOfAPI": {"", map[string]string{"Origin": "https://api.example"}, http.StatusForbidden},
		"OtherPort":   {"", map[string]string{"Origin": "http://127.0.0.1:1"}, http.StatusForbidden},
		"DNSRebinding": {
			"evil.example:8090", map[string]string{"Sec-Fetch-Site": "same-origin"}, http.StatusMisdirectedRequest,
		},
		"Localhost": {"localhost:8090", nil, http.StatusOK},
	} {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		request.Host = test.host
		request.Header.Set("Content-Type", "application/json")
		for key, value := range test.header {
			request.Header.Set(key, value)
		}
		response, err := web.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != test.want {
			t.Errorf("%s: %s, want %d", name, response.Status, test.want)
		}
	}
}

// With only its role and its permissions, the console sees the flow, and a group that it pauses takes no messages
// until it is resumed.
func TestConsolePausesAGroup(t *testing.T) {
	t.Parallel()
	owner, admin := testenv.Postgres(t), testenv.AMQP(t)
	awaitEffects := effectsIn(t, owner)
	url := owner.Config().ConnString()
	topology := names(t, probed(Config{})).topology()
	if err := topology.Declare(t.Context(), admin); err != nil {
		t.Fatal(err)
	}
	given := func(role string, p rabbit.Permissions) Config {
		return probed(Config{
			PostgresURL: testenv.As(t, url, role), TopologyGiven: true,
			AMQPURL: testenv.Management(t, admin).User(p.Configure, p.Write, p.Read),
			Edge:    Edge{NoAuth: true},
		})
	}
	await(t, "relay", serve(t, RunRelay, given("shop_relay", topology.PublisherPermissions())), http.StatusOK)
	await(t, "consumer", serve(t, RunConsumer, given("shop_consumer", topology.ConsumerPermissions())), http.StatusOK)
	console := start(t, RunConsole, given("shop_operator", topology.ObserverPermissions()))
	await(t, "console", console.ready, http.StatusOK)
	transport := connecthttp.NewTransport(newHTTPClient(t, true), console.url)
	client := opsv1connect.NewOpsServiceClient(connect.NewClient(transport))
	if err := send(t.Context(), owner, "", "first"); err != nil {
		t.Fatal(err)
	}
	awaitEffects(1)
	pause := &opsv1.PauseGroupRequest{Group: probeGroup, Reason: "why"}
	if _, err := client.PauseGroup(t.Context(), pause); err != nil {
		t.Fatal(err)
	}
	awaitQueue(t, client, func(queue *opsv1.Station) bool {
		return queue.GetWaiting() == 0 && consumersOf(t, admin) == 0
	})
	if err := send(t.Context(), owner, "", "second"); err != nil {
		t.Fatal(err)
	}
	awaitQueue(t, client, func(queue *opsv1.Station) bool { return queue.GetWaiting() == 1 })
	awaitEffects(1)
	resume := &opsv1.ResumeGroupRequest{Group: probeGroup, Reason: "why"}
	if _, err := client.ResumeGroup(t.Context(), resume); err != nil {
		t.Fatal(err)
	}
	awaitEffects(2)
}

// consumersOf returns how many consumers the probes' queue has.
func consumersOf(t *testing.T, url string) int {
	t.Helper()
	gauge := rabbit.NewGauge(url, "test")
	defer gauge.Close()
	depths, err := gauge.Read(t.Context(), []string{probeQueue})
	if err != nil || depths[0].Missing {
		t.Fatal(depths, err)
	}
	return depths[0].Consumers
}

// awaitQueue watches the flow until the station of the probes' queue satisfies wanted.
func awaitQueue(t *testing.T, client opsv1connect.OpsServiceClient, wanted func(queue *opsv1.Station) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	stream, err := client.WatchFlow(ctx, &opsv1.WatchFlowRequest{})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for {
		sample, err := stream.Receive()
		if err != nil {
			t.Fatal(err)
		}
		for _, station := range sample.GetStations() {
			if station.GetName() == probeQueue && station.Waiting != nil && wanted(station) {
				return
			}
		}
	}
}
