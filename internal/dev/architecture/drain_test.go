package architecture

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"
)

// number returns what the first group of a pattern matches in a file of the project.
func number(t *testing.T, name, pattern string) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "..", filepath.FromSlash(name)))
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(pattern).FindSubmatch(text)
	if found == nil {
		t.Fatalf("%s does not have %s", name, pattern)
	}
	value, err := strconv.Atoi(string(found[1]))
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// Nobody kills a process that still drains. Besides the drain a process needs a moment to close what it has open.
func TestDeploymentsGrantTheDrain(t *testing.T) {
	t.Parallel()
	const moment = 2 * time.Second
	drain := time.Duration(max(
		number(t, "internal/rpcserver/server.go", `drainTimeout = (\d+) \* time\.Second`),
		number(t, "internal/rabbitrpc/server.go", `DrainTimeout, (\d+)\*time\.Second\)`),
		number(t, "internal/rabbit/consumer.go", `DrainTimeout, (\d+)\*time\.Second\)`),
	)) * time.Second
	compose := time.Duration(number(t, "docker-compose.yml", `&shop\n(?:.*\n)*?  stop_grace_period: (\d+)s`)) * time.Second
	if compose < drain+moment {
		t.Errorf("docker-compose.yml grants %s, a drain takes up to %s", compose, drain)
	}
	before := time.Duration(number(t, "deploy/kubernetes/base/api.yaml", `preStop: \{sleep: \{seconds: (\d+)\}\}`)) * time.Second
	pod := time.Duration(number(t, "deploy/kubernetes/base/pod.yaml", `terminationGracePeriodSeconds: (\d+)`)) * time.Second
	if pod < before+drain+moment {
		t.Errorf("pods are granted %s, preStop and drain take up to %s", pod, before+drain)
	}
}
