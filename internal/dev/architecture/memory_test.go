package architecture

import "testing"

// takers are the processes that take calls. A feature's test adds its own.
var takers = []string{"api"}

// The memory limit of a pod covers everything that callers can use up within their limits, and the needs of an idle
// process.
func TestLimitsFitIntoAPod(t *testing.T) {
	t.Parallel()
	const (
		kibibyte, mebibyte = 1 << 10, 1 << 20
		baseline           = 64 * mebibyte // the program, its pools, caches and answers
		connection         = 32 * kibibyte // stacks and buffers, with TLS
	)
	headers := kibibyte *
		number(t, "internal/rpcserver/server.go", `MaxHeaderBytes = cmp\.Or\(c\.MaxHeaderBytes, (\d+)<<10\)`)
	part := number(t, "internal/app/edge.go", `const part, unlimited = (\d+),`)
	conns := number(t, "deploy/kubernetes/base/kustomization.yaml", `HTTP_MAX_CONNS=(\d+)`)
	for _, process := range takers {
		limit := number(t, "deploy/kubernetes/base/"+process+".yaml", `limits: \{memory: (\d+)Mi\}`) * mebibyte
		collected := limit / 10 * 8 // GOMEMLIMIT
		if needed := collected/part + conns*(connection+headers) + baseline; needed > collected {
			t.Errorf("%s: budget, connections and baseline may need %d MiB, but the limit leaves %d MiB",
				process, needed/mebibyte, collected/mebibyte)
		}
	}
}
