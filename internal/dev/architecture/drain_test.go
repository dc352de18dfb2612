package architecture

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"
)

// number returns the match of a pattern's first group in a file of the project.
func number(t *testing.T, name, pattern string) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "..", filepath.FromSlash(name)))
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(pattern).FindSubmatch(text)
	if found == nil {
		t.Fatalf("%s does not match %s", name, pattern)
	}
	value, err := strconv.Atoi(string(found[1]))
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// drains lists the files with a DrainTimeout. A feature's test adds its own.
var drains = []string{"internal/rabbit/consumer.go"}

// Deployments do not kill a process that still drains. After the drain a process needs a moment to close connections.
func TestDeploymentsGrantTheDrain(t *testing.T) {
	t.Parallel()
	const moment = 2 * time.Second
	longest := number(t, "internal/rpcserver/server.go", `drainTimeout = (\d+) \* time\.Second`)
	for _, drains := range drains {
		longest = max(longest, number(t, drains, `DrainTimeout, (\d+)\*time\.Second\)`))
	}
	drain := time.Duration(longest) * time.Second
	seconds := func(name, pattern string) time.Duration {
		return time.Duration(number(t, name, pattern)) * time.Second
	}
	compose := seconds("docker-compose.yml", `&shop\n(?:.*\n)*?  stop_grace_period: (\d+)s`)
	if compose < drain+moment {
		t.Errorf("docker-compose.yml grants %s, but a drain takes up to %s", compose, drain)
	}
	before := seconds("deploy/kubernetes/base/api.yaml", `preStop: \{sleep: \{seconds: (\d+)\}\}`)
	pod := seconds("deploy/kubernetes/base/pod.yaml", `terminationGracePeriodSeconds: (\d+)`)
	if pod < before+drain+moment {
		t.Errorf("pods have %s, but preStop and drain take up to %s", pod, before+drain)
	}
}
