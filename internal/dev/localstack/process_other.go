//go:build unix && !linux

package localstack

import (
	"fmt"
	"os/exec"
	"strconv"
	"strings"
)

// startTime identifies the process that has this pid now by the second of its start.
// ok is false if there is none, or only a zombie.
func startTime(pid int) (started string, ok bool) {
	out, err := exec.Command("ps", "-o", "state=,lstart=", "-p", strconv.Itoa(pid)).Output()
	if err != nil {
		return "", false
	}
	state, started, found := strings.Cut(strings.TrimSpace(string(out)), " ")
	return strings.TrimSpace(started), found && !strings.HasPrefix(state, "Z")
}

// descendants returns the running descendants of a process in any session.
func descendants(pid int) ([]process, error) {
	out, err := exec.Command("ps", "-A", "-o", "pid=,ppid=").Output()
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	children := map[int][]int{}
	for line := range strings.Lines(string(out)) {
		var child, parent int
		if _, err := fmt.Sscan(line, &child, &parent); err != nil {
			return nil, fmt.Errorf("parse list of processes: %w", err)
		}
		children[parent] = append(children[parent], child)
	}
	return findDescendants(pid, children), nil
}
