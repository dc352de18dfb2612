//go:build unix && !linux

package main

import "syscall"

// endWithUs does nothing: only Linux can. Ctrl-C and SIGTERM end the children everywhere, SIGKILL leaves them behind.
func endWithUs(*syscall.SysProcAttr) {}
