//go:build unix

package localstack

import (
	"errors"
	"io"
	"testing"
)

// Each Postgres process has its own session, and a frozen process does not notice that its parent has ended.
func TestFrozenServersLeaveNothingBehind(t *testing.T) {
	config := Config{Dir: t.TempDir(), Profile: "test", Log: io.Discard}
	server, err := Cluster(t.Context(), config)
	if err != nil {
		t.Fatalf("start cluster: %v", err)
	}
	defer server.Release()
	postgres, _ := server.instance.recorded(postgresName)
	started, err := descendants(postgres.PID)
	if err != nil || len(started) < 4 {
		t.Fatalf("postgres started %v (%v), want its background processes", started, err)
	}
	if err := server.Freeze(); err != nil {
		t.Fatalf("freeze: %v", err)
	}
	if err := postgres.stop(stopAtOnce); err != nil { // as the watchdog does
		t.Fatalf("stop: %v", err)
	}
	for _, p := range append(started, postgres) {
		if p.alive() {
			t.Errorf("%+v still runs", p)
		}
	}
	if err := server.Freeze(); !errors.Is(err, errEnded) {
		t.Errorf("freeze again: %v, want %v", err, errEnded)
	}
}
