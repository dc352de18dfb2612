//go:build unix && !linux

package main

import "syscall"

// endWithUs does nothing, because only Linux supports it. Ctrl-C and SIGTERM end the children everywhere, but SIGKILL
// leaves them running.
func endWithUs(*syscall.SysProcAttr) {}
