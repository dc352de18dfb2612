//go:build !linux

package postgres

import "syscall"

// limitSilence: other systems have no such option, and their own timeouts are shorter than Linux'.
func limitSilence(string, string, syscall.RawConn) error { return nil }
