package main

import "syscall"

// endWithUs makes the kernel kill the child when the demo is killed.
func endWithUs(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGKILL }
