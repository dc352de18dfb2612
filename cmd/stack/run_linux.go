package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"
)

// endWithParent makes the kernel send SIGTERM to the command when we are killed.
func endWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGTERM }

func parentName(pid int) string {
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(name))
}
