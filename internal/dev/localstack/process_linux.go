package localstack

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// startTime identifies the process that has this pid now by the boot of the machine
// and the clock ticks from boot to the start of the process (field 22 of
// /proc/PID/stat, see proc(5)). ok is false if there is none, or only a zombie.
func startTime(pid int) (started string, ok bool) {
	fields := statFields(pid)
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return "", false
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", false
	}
	return strings.TrimSpace(string(boot)) + "/" + fields[19], true
}

// descendants returns the running descendants of a process in any session.
func descendants(pid int) ([]process, error) {
	entries, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	children := map[int][]int{}
	for _, entry := range entries {
		child, err := strconv.Atoi(filepath.Base(entry))
		if err != nil {
			continue
		}
		if fields := statFields(child); len(fields) > 1 {
			parent, err := strconv.Atoi(fields[1])
			if err != nil {
				return nil, fmt.Errorf("parse parent of process %d: %w", child, err)
			}
			children[parent] = append(children[parent], child)
		}
	}
	return findDescendants(pid, children), nil
}

// statFields returns the fields of /proc/PID/stat from the third on, or nil if there is no such process.
func statFields(pid int) []string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	// The second field is the program's name in parentheses, and may contain both
	// spaces and parentheses. Field 3, the state, follows the last one.
	_, rest, _ := bytes.Cut(stat[bytes.LastIndexByte(stat, ')'):], []byte(" "))
	return strings.Fields(string(rest))
}
