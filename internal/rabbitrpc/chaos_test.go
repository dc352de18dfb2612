package rabbitrpc_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/dev/testenv"
)

const (
	chaosCalls   = 10_000
	chaosCallers = 64
)

// TestChaos makes many calls. Every second, or as soon as another replica serves, it kills one of three replicas and
// cuts one of the connections, the client's included. Every call must end with its own answer or with an error, and
// the error must match what was executed.
func TestChaos(t *testing.T) {
	t.Parallel()
	amqpURL, effects := testenv.AMQP(t), t.TempDir()
	var proxies []*testenv.TCPProxy
	proxied := func() string {
		proxy, url := testenv.ProxyURL(t, amqpURL)
		proxies = append(proxies, proxy)
		return url
	}
	var children [3]*child
	var environments [3][]string
	for i := range children {
		environments[i] = []string{"AMQP_URL=" + proxied(), effectsVariable + "=" + effects}
		children[i] = spawn(t, "amqp", environments[i]...)
	}
	awaitReplicas(t, amqpURL, "probe.v1.Probe", len(children))
	client := newClient(t, proxied())

	results := make(chan map[string]error, 1)
	go func() { results <- callAll(t, client) }()
	second := time.NewTicker(time.Second)
	defer second.Stop()
	faults := 0
	for {
		select {
		case outcomes := <-results:
			if faults < 2 {
				t.Errorf("only %d faults, want at least 2", faults)
			}
			checkEffects(t, outcomes, effects)
			return
		case <-second.C:
			if replicas(t, amqpURL, "probe.v1.Probe") < 2 {
				continue // the machine is too slow to restart them within a second
			}
			i := faults % len(children)
			children[i].kill()
			children[i] = spawn(t, "amqp", environments[i]...)
			proxies[(faults+2)%len(proxies)].Cut()
			faults++
		}
	}
}

// callAll makes the calls, half of them to each kind of method, and returns the error, or nil, of each call by its ID.
func callAll(t *testing.T, client *connect.Client) map[string]error {
	outcomes := make(map[string]error, chaosCalls)
	var mu sync.Mutex
	var next atomic.Int64
	var callers sync.WaitGroup
	for range chaosCallers {
		callers.Go(func() {
			for i := next.Add(1); i <= chaosCalls; i = next.Add(1) {
				id, spec := fmt.Sprintf("put-%05d", i), again
				if i%2 == 0 {
					id, spec = fmt.Sprintf("add-%05d", i), once
				}
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				out, err := call(ctx, client, spec, id)
				cancel()
				if err == nil && out != id {
					t.Errorf("call %s got the answer of %s", id, out)
				}
				mu.Lock()
				outcomes[id] = err
				mu.Unlock()
				if err != nil && !errors.Is(err, context.DeadlineExceeded) {
					// Back off. Otherwise no calls would be left when the client is connected again.
					time.Sleep(10 * time.Millisecond)
				}
			}
		})
	}
	callers.Wait()
	return outcomes
}

// checkEffects compares the outcomes of the calls with their effects.
func checkEffects(t *testing.T, outcomes map[string]error, effects string) {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(effects, "log"))
	if err != nil {
		t.Fatal(err)
	}
	added := map[string]int{}
	for line := range strings.Lines(string(log)) {
		added[strings.TrimPrefix(strings.TrimPrefix(strings.TrimSpace(line), "add "), "put ")]++
	}
	answers, texts := 0, map[string]int{}
	for id, err := range outcomes {
		_, missing := os.Stat(filepath.Join(effects, id))
		done := missing == nil || added[id] > 0
		if added[id] > 1 {
			t.Errorf("%s was executed %d times", id, added[id])
		}
		var failure *connect.Error
		switch {
		case err == nil:
			answers++
			if !done {
				t.Errorf("%s was answered but not executed", id)
			}
		case !errors.As(err, &failure) ||
			failure.Code() != connect.CodeUnavailable && failure.Code() != connect.CodeDeadlineExceeded:
			t.Errorf("%s ended with %v", id, err)
		case done && strings.Contains(failure.Message(), "nothing was"):
			t.Errorf("%s was executed, but its caller got %q", id, failure.Message())
		default:
			texts[failure.Error()]++
		}
	}
	t.Logf("%d of %d calls were answered; the others: %v", answers, len(outcomes), texts)
	if len(outcomes) != chaosCalls || answers < chaosCalls/2 {
		t.Errorf("%d of %d calls were answered, want at least half of %d", answers, len(outcomes), chaosCalls)
	}
}
