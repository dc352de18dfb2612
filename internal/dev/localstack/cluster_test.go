//go:build unix

package localstack

import (
	"errors"
	"io"
	"testing"
)

// The processes of a Postgres have sessions of their own, and frozen ones do not notice that their parent is gone.
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
		t.Fatalf("it started %v (%v), want its background processes", started, err)
	}
	if err := server.Freeze(); err != nil {
		t.Fatalf("freeze: %v", err)
	}
	if err := postgres.stop(stopAtOnce); err != nil { // as the watchdog does, if nobody else
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
