package localstack

import (
	"bytes"
	"fmt"
	"os"
	"strings"
)

// startTime identifies the process that has this pid now: the boot of the machine
// and the clock ticks from boot to the start of the process (field 22 of
// /proc/PID/stat, see proc(5)). ok is false if there is none, or only a zombie.
func startTime(pid int) (started string, ok bool) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", false
	}
	// The second field is the program's name in parentheses, and may contain both
	// spaces and parentheses. Field 3, the state, follows the last one.
	_, rest, found := bytes.Cut(stat[bytes.LastIndexByte(stat, ')'):], []byte(" "))
	fields := strings.Fields(string(rest))
	if !found || len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return "", false
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", false
	}
	return strings.TrimSpace(string(boot)) + "/" + fields[19], true
}
