//go:build unix && !linux

package main

import (
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// endWithParent does nothing, because only Linux supports it. A command whose stack
// was killed loses its servers, and must end without a signal.
func endWithParent(*syscall.SysProcAttr) {}

func parentName(pid int) string {
	out, err := exec.Command("ps", "-o", "comm=", "-p", strconv.Itoa(pid)).Output()
	if err != nil {
		return ""
	}
	return filepath.Base(strings.TrimSpace(string(out)))
}
