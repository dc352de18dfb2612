package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
)

// started is a process of the service.
type started struct {
	name, url string
	ended     chan error
	log       bytes.Buffer     // complete once the process has ended
	checkLog  func(log string) // called with the complete log, unless it is nil
}

// startProcess starts a command that runs until the test ends.
func startProcess(t *testing.T, name string, environment ...string) *started {
	t.Helper()
	return startProgram(t, binary(), name, environment...)
}

func startProgram(t *testing.T, program, name string, environment ...string) *started {
	t.Helper()
	ops := testenv.FreeAddress(t)
	p := &started{name: name, url: "http://" + ops, ended: make(chan error, 1)}
	command := exec.Command(program, name)
	command.Env, command.Stderr = append(environment, "LISTEN="+testenv.FreeAddress(t), "OPS_LISTEN="+ops), &p.log
	if !slices.ContainsFunc(environment, func(setting string) bool { return strings.HasPrefix(setting, "JWT_") }) {
		command.Env = append(command.Env, "INSECURE_NO_AUTH=true")
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.ended <- command.Wait() }()
	t.Cleanup(func() {
		_ = command.Process.Signal(syscall.SIGTERM) // it may have ended
		if err := <-p.ended; err != nil || t.Failed() {
			t.Errorf("%s: %v\n%s", name, err, &p.log)
		}
		if p.checkLog != nil {
			p.checkLog(p.log.String())
		}
	})
	return p
}

// await waits until /readyz reports that the process is ready, or that it misses the named requirement.
func (p *started) await(t *testing.T, missing ...string) {
	t.Helper()
	testenv.Eventually(t, 60*time.Second, func() error {
		response, err := http.Get(p.url + "/readyz")
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		defer response.Body.Close()
		var answer struct {
			Ready   bool
			Missing []string
		}
		err = json.NewDecoder(response.Body).Decode(&answer)
		if err != nil || answer.Ready != (len(missing) == 0) ||
			len(missing) > 0 && !slices.Contains(answer.Missing, missing[0]) {
			return fmt.Errorf("%s misses %q (%v), want %q", p.name, answer.Missing, err, missing)
		}
		return nil
	})
}

// processRole is a process with its role in the database.
type processRole struct{ name, role string }

// startOrder also contains processes that the tests of features add.
var startOrder = []processRole{{"api", "shop_api"}, {"relay", "shop_relay"}, {"consumer", "shop_consumer"}}

// Processes may start in any order. They wait for servers, roles and schema, and migrate waits for Postgres: in the end
// all are ready, and none has ended. In this test even the roles do not exist at first.
func TestAnyOrderOfStart(t *testing.T) {
	t.Parallel()
	for name, postgresFirst := range map[string]bool{"ProcessesFirst": false, "PostgresFirst": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			direct, _ := testenv.Cluster(t)
			database, url := testenv.ProxyURL(t, direct)
			broker, amqp := testenv.ProxyURL(t, testenv.AMQP(t))
			broker.Refuse(true)
			database.Refuse(!postgresFirst)
			var all []*started
			for _, process := range startOrder {
				url := testenv.As(t, url, process.role)
				all = append(all, startProcess(t, process.name, "POSTGRES_URL="+url, "AMQP_URL="+amqp))
			}
			for _, p := range all {
				p.await(t, "database") // Postgres is unreachable, or the role does not exist
			}
			migrated := make(chan string, 1)
			go func() {
				status, stdout, stderr := call(t, []string{"POSTGRES_URL=" + url, "MIGRATE_WAIT=1m"}, "migrate")
				migrated <- fmt.Sprint(status, stdout, stderr)
			}()
			database.Refuse(false)
			if result := <-migrated; result[0] != '0' {
				t.Fatalf("migrate: %s", result)
			}
			all[0].await(t)
			all[1].await(t, "broker")
			broker.Refuse(false)
			for _, p := range all {
				p.await(t)
			}
		})
	}
}
