package main

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/ops"
)

func TestDoctor(t *testing.T) {
	f := newFixture(t)
	var answer struct {
		Verdict  ops.Verdict
		Findings []ops.Finding
	}
	f.runJSON(1, "doctor", &answer)
	if answer.Verdict != ops.Wrong || len(answer.Findings) < 15 {
		t.Errorf("got %+v", answer)
	}
	// Without fsync, as on some test servers, the doctor reports one more failure.
	var fsync string
	if err := f.QueryRow(t.Context(), `SHOW fsync`).Scan(&fsync); err != nil {
		t.Fatal(err)
	}
	failed, healthy, status := "1 check failed", "", 0
	if fsync == "off" {
		failed, healthy, status = "2 checks failed", "1 check failed", 1
		f.wantOutput(1, "doctor", `durability +wrong +fsync is off`)
	}
	f.wantOutput(1, "doctor", `relay +wrong +no relay holds shard 0\n +→ Start a relay`, `shop: `+failed+`\n$`)

	service := exec.CommandContext(t.Context(), binary(), "all", "--listen=127.0.0.1:0", "--insecure-no-auth")
	service.Env = append(f.environment, "POSTGRES_URL="+f.Config().ConnString())
	service.Cancel, service.WaitDelay = func() error { return service.Process.Signal(syscall.SIGTERM) }, 10*time.Second
	if err := service.Start(); err != nil {
		t.Fatal(err)
	}
	defer service.Wait()
	defer service.Process.Signal(syscall.SIGTERM)
	testenv.Eventually(t, 30*time.Second, func() error {
		_, stdout, stderr := call(t, f.environment, "doctor")
		if strings.Contains(stdout, "no relay holds") || !strings.Contains(stderr, healthy) {
			return fmt.Errorf("%s%s", stdout, stderr)
		}
		if strings.Contains(stdout, "there is no queue") {
			return errors.New("queues are not declared yet")
		}
		return nil
	})
	f.runJSON(status, "doctor", &answer)
	for _, finding := range answer.Findings {
		// The broker may be old, and fsync off.
		if finding.Verdict != ops.OK && finding.Check != "broker" && finding.Check != "durability" {
			t.Errorf("%+v", finding)
		}
	}
}

// The doctor reports checks that it could not run, and exits with 1.
func TestDoctorWithoutServers(t *testing.T) {
	f := newFixture(t)
	good := f.environment
	f.environment = append(good, goodPostgres)
	f.wantOutput(1, "doctor",
		`database +unknown +could not run: .*refused`, `→ Check host and port in POSTGRES_URL`,
		`skipped for the same reason: schema, grants, .*retries\n`,
		`broker +(ok|attention) `, `shop: \d+ checks could not run\n$`)
	f.environment = append(good, goodAMQP)
	f.wantOutput(1, "doctor",
		`broker +unknown +could not run: .*refused`, `→ Check host and port in AMQP_URL`,
		`skipped for the same reason: queues, policies, publishers\n`, `relay +wrong`,
		`shop: \d checks? failed, 4 checks could not run\n$`)
	var answer struct {
		Verdict  ops.Verdict
		Findings []ops.Finding
	}
	f.environment = []string{goodPostgres, goodAMQP}
	f.runJSON(1, "doctor", &answer)
	if answer.Verdict != ops.Unknown || len(answer.Findings) != 2 || len(answer.Findings[0].Skipped) < 12 {
		t.Errorf("got %+v", answer)
	}
}
