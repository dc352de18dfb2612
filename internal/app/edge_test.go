package app

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/changes"
	"example.com/shop/internal/dev/testenv"
	authv1 "example.com/shop/internal/gen/auth/v1"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/rpcserver"
	"example.com/shop/internal/telemetry"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// api is a running API with the real domain.
type api struct {
	url    string
	server *rpcserver.Server
	db     *pgxpool.Pool
}

func startAPI(t *testing.T, config Edge, more ...func(*connect.Server)) *api {
	t.Helper()
	edge, err := newEdge(config)
	if err != nil {
		t.Fatal(err)
	}
	db := testenv.Postgres(t)
	p := &process{
		edge: edge, telemetry: new(telemetry.Providers), db: db, out: outbox.NewWriter(db, nil, nil),
		changes: changes.New(changes.Config{}),
	}
	p.config.domain = newDomain
	if err := p.compose(); err != nil {
		t.Fatal(err)
	}
	a := &api{db: db, server: p.newServer(append(more, p.domain.register)...)}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a.url = "http://" + listener.Addr().String()
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- a.server.Serve(ctx, listener) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return a
}

func newHTTPClient(t *testing.T, http2 bool) *http.Client {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(!http2)
	protocols.SetUnencryptedHTTP2(http2)
	transport := &http.Transport{Protocols: protocols}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// apiKeys makes a key for each role, and the lines that configure the service.
func apiKeys(t *testing.T, roles ...string) (keys map[string]string, lines string) {
	t.Helper()
	keys = make(map[string]string)
	for _, role := range roles {
		key, line, err := auth.NewKey(role, []string{role})
		if err != nil {
			t.Fatal(err)
		}
		keys[role] = key
		lines += line + "\n"
	}
	return keys, lines
}

// protocols are all protocols over HTTP. Those with get support only procedures without side effects.
var protocols = []struct {
	name       string
	http2, get bool
	options    []connecthttp.Option
}{
	{"Connect", false, false, nil},
	{"Connect over HTTP/2", true, false, nil},
	{"Connect with JSON", false, false, []connecthttp.Option{connecthttp.WithProtoJSON()}},
	{"Connect GET", false, true, []connecthttp.Option{connecthttp.WithHTTPGet()}},
	{"Connect GET with JSON", true, true, []connecthttp.Option{connecthttp.WithHTTPGet(), connecthttp.WithProtoJSON()}},
	{"gRPC", true, false, []connecthttp.Option{connecthttp.WithGRPC()}},
	{"gRPC with JSON", true, false, []connecthttp.Option{connecthttp.WithGRPC(), connecthttp.WithProtoJSON()}},
	{"gRPC-Web", false, false, []connecthttp.Option{connecthttp.WithGRPCWeb()}},
	{"gRPC-Web over HTTP/2", true, false, []connecthttp.Option{connecthttp.WithGRPCWeb()}},
}

// codeOf calls a procedure with an empty message and the given headers, and returns the response's code; 0 means OK.
func codeOf(t *testing.T, transport connect.Transport, spec connect.Spec, header map[string]string) connect.Code {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	ctx, info := connect.NewClientContext(ctx)
	for name, value := range header {
		info.RequestHeader().Set(name, value)
	}
	var in, out any = new(emptypb.Empty), new(emptypb.Empty)
	if method, ok := spec.Schema.(protoreflect.MethodDescriptor); ok {
		in, out = dynamicpb.NewMessage(method.Input()), dynamicpb.NewMessage(method.Output())
	}
	stream, err := connect.NewClient(transport).CallClientStream(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if err := stream.Send(in); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	_ = stream.CloseSend() // Receive returns the same error
	if err := stream.Receive(out); err != nil && !errors.Is(err, io.EOF) {
		return connect.CodeOf(err)
	}
	return 0
}

var (
	undeclared         = connect.Spec{Procedure: "/probe.v1.Probe/Undeclared", StreamType: connect.StreamTypeUnary}
	undeclaredReadable = connect.Spec{
		Procedure: "/probe.v1.Probe/Readable", StreamType: connect.StreamTypeUnary,
		IdempotencyLevel: connect.IdempotencyNoSideEffects,
	}
)

func registerUndeclared(s *connect.Server) {
	handler := func(_ context.Context, _ connect.Spec, stream connect.ServerStream) error {
		return stream.Send(new(emptypb.Empty))
	}
	for _, spec := range []connect.Spec{undeclared, undeclaredReadable} {
		s.Register(connect.Method{Spec: spec, Handler: handler})
	}
}

// Each procedure is open only to the callers that its proto file declares, over each protocol.
func TestAccess(t *testing.T) {
	t.Parallel()
	roles := map[string]bool{"stranger": true}
	for spec := range startAPI(t, Edge{}).server.Specs() {
		for _, role := range auth.AccessTo(spec).GetRoles() {
			roles[role] = true
		}
	}
	var names []string
	for role := range roles {
		names = append(names, role)
	}
	keys, lines := apiKeys(t, names...)
	a := startAPI(t, Edge{APIKeys: lines}, registerUndeclared)
	for _, protocol := range protocols {
		t.Run(protocol.name, func(t *testing.T) {
			t.Parallel()
			transport := connecthttp.NewTransport(newHTTPClient(t, protocol.http2), a.url, protocol.options...)
			procedures := 0
			for spec := range a.server.Specs() {
				if protocol.get && spec.IdempotencyLevel != connect.IdempotencyNoSideEffects ||
					!protocol.http2 && spec.StreamType == connect.StreamTypeBidi {
					continue
				}
				procedures++
				access := auth.AccessTo(spec)
				check := func(how string, header map[string]string, want connect.Code) {
					t.Helper()
					code := codeOf(t, transport, spec, header)
					denied := code == connect.CodeUnauthenticated || code == connect.CodePermissionDenied
					if want == 0 && denied || want != 0 && code != want {
						t.Errorf("%s %s: %s, want %s (0 for allowed)", spec.Procedure, how, code, want)
					}
				}
				type header = map[string]string
				const refused = connect.CodeUnauthenticated
				check("without credentials", nil, wantCode(access, ""))
				check("with a wrong key", header{"x-api-key": keys["stranger"] + "x"}, refused)
				check("with a wrong token", header{"authorization": "Bearer e30.e30."}, refused)
				check("with basic authentication", header{"authorization": "Basic YTpi"}, refused)
				both := header{"x-api-key": keys["stranger"], "authorization": "Bearer x"}
				check("with two credentials", both, refused)
				for role, key := range keys {
					check("as "+role, header{"x-api-key": key}, wantCode(access, role))
				}
			}
			if procedures == 0 {
				t.Error("no procedure was called")
			}
		})
	}
}

func wantCode(access *authv1.Access, role string) connect.Code {
	switch {
	case access.GetPublic():
		return 0
	case role == "":
		return connect.CodeUnauthenticated
	case access.GetAuthenticated(), slices.Contains(access.GetRoles(), role):
		return 0
	}
	return connect.CodePermissionDenied
}

// Every procedure declares its callers; TestAccess shows that one without a declaration is closed.
func TestEveryProcedureDeclaresAccess(t *testing.T) {
	t.Parallel()
	for spec := range startAPI(t, Edge{}).server.Specs() {
		access := auth.AccessTo(spec)
		if access.GetPublic() && (access.GetAuthenticated() || len(access.GetRoles()) > 0) {
			t.Errorf("%s is public but requires credentials", spec.Procedure)
		}
		if !access.GetPublic() && !access.GetAuthenticated() && len(access.GetRoles()) == 0 {
			t.Errorf("%s has no option (auth.v1.access)", spec.Procedure)
		}
	}
}

// No other spelling of a path bypasses the checks.
func TestPathTricks(t *testing.T) {
	t.Parallel()
	a := startAPI(t, Edge{}, registerUndeclared)
	client := newHTTPClient(t, false)
	for spec := range a.server.Specs() {
		if auth.AccessTo(spec).GetPublic() {
			continue
		}
		p := spec.Procedure
		for _, path := range []string{
			"/" + p, p + "/", p + "//", "/." + p, "/x/.." + p, "/%2e" + p, strings.ToLower(p), strings.ToUpper(p),
			strings.Replace(p, "/", "/%2f", 1), "/" + strings.Replace(p[1:], "/", "%2f", 1), p + "%00", p + ";x",
			p + "?connect=v1&encoding=json&message=%7B%7D", p + ".json", `\` + p[1:],
		} {
			for _, method := range []string{
				http.MethodPost, http.MethodGet, http.MethodPut, http.MethodOptions, http.MethodHead, "post",
			} {
				req, err := http.NewRequestWithContext(t.Context(), method, a.url, strings.NewReader("{}"))
				if err != nil {
					t.Fatal(err)
				}
				path, query, _ := strings.Cut(path, "?")
				req.URL.Opaque, req.URL.RawQuery = path, query // sent unchanged
				if strings.HasPrefix(path, "//") {
					req.URL.Opaque = "//" + req.URL.Host + path
				}
				req.Header.Set("Content-Type", "application/json")
				res, err := client.Do(req)
				if err != nil {
					continue // not valid HTTP
				}
				res.Body.Close()
				if res.StatusCode < 300 {
					t.Errorf("%s %s: %s", method, path, res.Status)
				}
			}
		}
	}
}

// The switch for development opens every procedure.
func TestNoAuth(t *testing.T) {
	t.Parallel()
	a := startAPI(t, Edge{NoAuth: true})
	transport := connecthttp.NewTransport(newHTTPClient(t, true), a.url)
	for spec := range a.server.Specs() {
		code := codeOf(t, transport, spec, nil)
		if code == connect.CodeUnauthenticated || code == connect.CodePermissionDenied {
			t.Errorf("%s: %s", spec.Procedure, code)
		}
	}
}

// Without authentication, pages cannot call by DNS rebinding.
func TestNoAuthIsServedUnderLocalNamesOnly(t *testing.T) {
	t.Parallel()
	a := startAPI(t, Edge{NoAuth: true, NoAuthHosts: []string{"api"}}, registerUndeclared)
	for host, want := range map[string]int{
		"localhost:8080": http.StatusOK, "127.0.0.1:8080": http.StatusOK, "[::1]:8080": http.StatusOK,
		"api:8080": http.StatusOK, "api": http.StatusOK,
		"evil.example:8080": http.StatusMisdirectedRequest, "api.evil.example": http.StatusMisdirectedRequest,
		"10.0.0.1:8080": http.StatusMisdirectedRequest,
	} {
		url := a.url + undeclared.Procedure
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		request.Host = host
		request.Header.Set("Content-Type", "application/json")
		response, err := newHTTPClient(t, false).Do(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != want {
			t.Errorf("%s: %s, want %d", host, response.Status, want)
		}
	}
}

func TestNoAuthIsLoggedEveryMinute(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		ctx, cancel := context.WithTimeout(t.Context(), 150*time.Second)
		defer cancel()
		warnOfNoAuth(ctx, slog.New(slog.NewTextHandler(&log, nil)))
		if n := strings.Count(log.String(), "level=WARN"); n != 3 { // at the start, after a minute, after two
			t.Errorf("logged %d times in two and a half minutes:\n%s", n, &log)
		}
	})
}

// Probes and metrics are served only on the operators' port.
func TestProbesAreNotOnTheCallersPort(t *testing.T) {
	t.Parallel()
	config := probed(Config{PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t), Edge: Edge{NoAuth: true}})
	for name, process := range processes {
		if !process.takesCalls {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			served := start(t, process.run, config)
			await(t, name, served.ready, http.StatusOK)
			for _, path := range []string{"/healthz", "/readyz", "/metrics"} {
				for base, want := range map[string]int{served.ops: http.StatusOK, served.url: http.StatusNotFound} {
					response, err := web.Get(base + path)
					if err != nil {
						t.Fatal(err)
					}
					response.Body.Close()
					if response.StatusCode != want {
						t.Errorf("%s: %s, want %d", base+path, response.Status, want)
					}
				}
			}
		})
	}
}
