package main

import (
	"context"
	"maps"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rabbitrpc"
)

func init() {
	maps.Copy(wrongSettings, map[string]wrongSetting{
		"rpc without broker":    {"AMQP_URL=", "api --rpc-over-rabbitmq", "--amqp-url"},
		"rpc prefetch":          {"RPC_PREFETCH=0", "all", "--rpc-prefetch"},
		"rpc call over both":    {"", "rpc call a.B/C --amqp --http=http://127.0.0.1:1", "--amqp"},
		"rpc ls without broker": {"AMQP_URL=http://x", "rpc ls", "--amqp-url"},
		"rpc ls for hours":      {"", "rpc ls --rate=1h", "--rate"},
	})
	failing = append(failing, "rpc ls", "rpc call --amqp a.B/C", "api --amqp-url=http://u:hunter2@h?hunter2")
}

// serveQueue serves over RabbitMQ until the test ends.
func serveQueue(t *testing.T, url string, register func(*connect.Server)) {
	t.Helper()
	rpc := connect.NewServer()
	register(rpc)
	run(t, rabbitrpc.NewServer(rabbitrpc.ServerConfig{URL: url}, rpc).Run)
}

func TestRPCCallOverRabbitMQ(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	environment := []string{"AMQP_URL=" + url}
	const method = "grpc.health.v1.Health/Check"
	status, _, stderr := call(t, environment, "rpc", "call", method, "--amqp")
	want := "shop: unavailable: no replica serves grpc.health.v1.Health; nothing was done\n"
	if status != 1 || stderr != want {
		t.Errorf("without a server: exit status %d, %q", status, stderr)
	}
	serveQueue(t, url, health)
	var stdout string
	testenv.Eventually(t, 20*time.Second, func() error { // the server is starting
		status, stdout, stderr = call(t, environment, "rpc", "call", method, "--amqp", "--header", "authorization=token")
		if status != 0 && strings.Contains(stderr, "no replica serves") {
			return context.DeadlineExceeded
		}
		return nil
	})
	wantJSON(t, stdout, "status", "SERVING")
	status, _, stderr = call(t, environment, "rpc", "call", method, "--amqp", "--data", `{"service": "x"}`)
	if want := "shop: unauthenticated: no token for x\n"; status != 1 || stderr != want {
		t.Errorf("exit status %d, %q", status, stderr)
	}
}

func TestRPCLs(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	environment := []string{"AMQP_URL=" + url}
	for range 2 {
		serveQueue(t, url, health)
	}
	testenv.Eventually(t, 20*time.Second, func() error {
		states, err := rabbitrpc.Look(t.Context(), url, "grpc.health.v1.Health")
		if err == nil && states[0].Replicas != 2 {
			err = context.DeadlineExceeded
		}
		return err
	})
	args := []string{"rpc", "ls", "--rate", "100ms", "grpc.health.v1.Health", "none.v1.None"}
	status, stdout, stderr := call(t, environment, args...)
	want := []string{"SERVICE REPLICAS WAITING CALLS/S", "grpc.health.v1.Health 2 0 0.0", "none.v1.None 0 0 0.0"}
	lines := strings.Split(strings.TrimSpace(stdout), "\n")
	if status != 0 || len(lines) != len(want) {
		t.Fatalf("exit status %d, %q, %q", status, stdout, stderr)
	}
	for i, line := range lines {
		if collapse(line) != want[i] {
			t.Errorf("line %q, want %q", line, want[i])
		}
	}
	_, stdout, _ = call(t, environment, "rpc", "ls")
	if strings.Contains(stdout, "grpc.") || strings.Count(stdout, "\n") < 2 || !strings.Contains(stdout, " -\n") {
		t.Errorf("services of this program: %q", stdout)
	}
}
