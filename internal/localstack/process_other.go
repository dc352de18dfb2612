//go:build !linux

package localstack

import (
	"os/exec"
	"strconv"
	"strings"
)

// startTime identifies the process that has this pid now, by the second it was
// started in. ok is false if there is none, or only a zombie.
func startTime(pid int) (started string, ok bool) {
	out, err := exec.Command("ps", "-o", "state=,lstart=", "-p", strconv.Itoa(pid)).Output()
	if err != nil {
		return "", false
	}
	state, started, found := strings.Cut(strings.TrimSpace(string(out)), " ")
	return strings.TrimSpace(started), found && !strings.HasPrefix(state, "Z")
}
