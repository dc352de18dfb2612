//go:build failpoints

package failpoint

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

var (
	mu   sync.Mutex
	left = parse(os.Getenv("FAILPOINT"))
)

// Hit kills the process if FAILPOINT names this point and this is the n-th hit.
func Hit(name string) {
	mu.Lock()
	defer mu.Unlock()
	n, ok := left[name]
	if !ok {
		return
	}
	left[name] = n - 1
	if n == 1 {
		fmt.Fprintf(os.Stderr, "failpoint %s: killed\n", name)
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {} // until the signal arrives: nothing after this point may run
	}
}

func parse(spec string) map[string]int {
	if spec == "" {
		return nil
	}
	name, times, _ := strings.Cut(spec, ":")
	n, err := strconv.Atoi(times)
	if times == "" {
		n, err = 1, nil
	}
	if err != nil || n < 1 {
		panic(fmt.Sprintf("FAILPOINT=%q: want NAME or NAME:N, the N-th hit kills", spec))
	}
	return map[string]int{name: n}
}
