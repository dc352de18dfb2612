package main

import "syscall"

// endWithUs makes the kernel end the child when we are killed.
func endWithUs(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGKILL }
