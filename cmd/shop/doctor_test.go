package main

import (
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
	o := newOffice(t)
	var answer struct {
		Verdict  ops.Verdict
		Findings []ops.Finding
	}
	o.json(1, "doctor", &answer)
	if answer.Verdict != ops.Wrong || len(answer.Findings) < 15 {
		t.Errorf("got %+v", answer)
	}
	// A server of tests may run without fsync, which is wrong, too.
	var fsync string
	if err := o.QueryRow(t.Context(), `SHOW fsync`).Scan(&fsync); err != nil {
		t.Fatal(err)
	}
	findings, healthy, status := "1 check has", "", 0
	if fsync == "off" {
		findings, healthy, status = "2 checks have", "1 check has found something wrong", 1
		o.says(1, "doctor", `durability +wrong +fsync is off`)
	}
	o.says(1, "doctor", `relay +wrong +no relay holds shard 0\n +→ Start a relay`, `shop: `+findings+` found something wrong\n$`)

	service := exec.CommandContext(t.Context(), binary(), "all", "--listen=127.0.0.1:0", "--insecure-no-auth")
	service.Env = append(o.environment, "POSTGRES_URL="+o.Config().ConnString())
	service.Cancel, service.WaitDelay = func() error { return service.Process.Signal(syscall.SIGTERM) }, 10*time.Second
	if err := service.Start(); err != nil {
		t.Fatal(err)
	}
	defer service.Wait()
	defer service.Process.Signal(syscall.SIGTERM)
	testenv.Eventually(t, 30*time.Second, func() error {
		_, stdout, stderr := call(t, o.environment, "doctor")
		if strings.Contains(stdout, "no relay holds") || !strings.Contains(stderr, healthy) {
			return fmt.Errorf("%s%s", stdout, stderr)
		}
		if strings.Contains(stdout, "there is no queue") {
			return fmt.Errorf("queues are not declared yet")
		}
		return nil
	})
	o.json(status, "doctor", &answer)
	for _, one := range answer.Findings {
		if one.Verdict != ops.OK && one.Check != "broker" && one.Check != "durability" { // an old broker, and no fsync
			t.Errorf("%+v", one)
		}
	}
}

// A doctor who could not look says so, and is not content.
func TestDoctorWithoutServers(t *testing.T) {
	o := newOffice(t)
	good := o.environment
	o.environment = append(good, goodPostgres)
	o.says(1, "doctor", `database +unknown +could not look: .*refused`, `→ Check host and port in POSTGRES_URL`, `not made for the same reason: schema, grants, .*retries\n`,
		`broker +(ok|attention) `, `shop: \d+ checks could not be made\n$`)
	o.environment = append(good, goodAMQP)
	o.says(1, "doctor", `broker +unknown +could not look: .*refused`, `→ Check host and port in AMQP_URL`, `not made for the same reason: queues, policies\n`, `relay +wrong`,
		`shop: \d checks? ha(s|ve) found something wrong, 3 checks could not be made\n$`)
	var answer struct {
		Verdict  ops.Verdict
		Findings []ops.Finding
	}
	o.environment = []string{goodPostgres, goodAMQP}
	o.json(1, "doctor", &answer)
	if answer.Verdict != ops.Unknown || len(answer.Findings) != 2 || len(answer.Findings[0].Skipped) < 12 {
		t.Errorf("got %+v", answer)
	}
}
