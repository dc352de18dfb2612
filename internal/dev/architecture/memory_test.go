package architecture

import "testing"

// The memory limit of a pod holds the product of the limits that callers can use up, and what the process needs when nobody calls.
func TestLimitsFitIntoAPod(t *testing.T) {
	t.Parallel()
	const (
		kibibyte, mebibyte = 1 << 10, 1 << 20
		baseline           = 64 * mebibyte // the program, its pools, caches and answers
		connection         = 32 * kibibyte // stacks and buffers, with TLS
	)
	headers := number(t, "internal/rpcserver/server.go", `MaxHeaderBytes = cmp\.Or\(c\.MaxHeaderBytes, (\d+)<<10\)`) * kibibyte
	part := number(t, "internal/app/edge.go", `const part, unlimited = (\d+),`)
	conns := number(t, "deploy/kubernetes/base/kustomization.yaml", `HTTP_MAX_CONNS=(\d+)`)
	for _, process := range []string{"api", "console"} {
		limit := number(t, "deploy/kubernetes/base/"+process+".yaml", `limits: \{memory: (\d+)Mi\}`) * mebibyte
		collected := limit / 10 * 9 // GOMEMLIMIT
		if needed := collected/part + conns*(connection+headers) + baseline; needed > collected {
			t.Errorf("%s: budget, connections and the rest may need %d MiB, and the limit leaves %d MiB", process, needed/mebibyte, collected/mebibyte)
		}
	}
}
