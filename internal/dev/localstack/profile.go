//go:build unix

package localstack

import (
	"syscall"
	"time"
)

// profile is a kind of servers. Profiles share nothing, so both can run at the same time.
type profile struct {
	name string

	// throwaway data is created at each start. So it is safe to run without fsync: no
	// corrupt data survives a power failure. It costs no time, because initdb takes one
	// second while RabbitMQ boots for seven.
	throwaway bool

	// postgres lists settings on top of postgresSettings.
	postgres []string
}

var profiles = map[string]profile{
	// dev is for trying out and measuring, so its commits must be durable.
	"dev": {name: "dev", postgres: []string{"fsync=on"}},
	"test": {name: "test", throwaway: true, postgres: []string{
		"fsync=off",
		"full_page_writes=off",
	}},
}

// postgresSettings are common to all profiles.
var postgresSettings = []string{
	"listen_addresses=127.0.0.1",
	// No socket: its path is limited to 107 bytes, and a checkout can be deep.
	"unix_socket_directories=",
	// For several test binaries, each with a few pools of parallel tests.
	"max_connections=300",
	// For two-phase commits: some tests leave prepared transactions behind on purpose,
	// and the default of 0 forbids them.
	"max_prepared_transactions=20",
	"synchronous_commit=on",
}

// stopStep is a signal and the time that the process has to end.
type stopStep struct {
	signal   syscall.Signal
	patience time.Duration
}

// killAfter is long enough for the kernel to end a killed process with much memory on a
// busy machine.
const killAfter = 5 * time.Second

// stopAtOnce is for processes that have nothing to save.
var stopAtOnce = []stopStep{{syscall.SIGKILL, killAfter}}

func (p profile) postgresStop() []stopStep {
	// "Immediate shutdown": no checkpoint. Throwaway data needs none.
	steps := append([]stopStep{{syscall.SIGQUIT, 5 * time.Second}}, stopAtOnce...)
	if p.throwaway {
		return steps
	}
	// "Fast shutdown": disconnects the clients and writes a checkpoint.
	return append([]stopStep{{syscall.SIGINT, 20 * time.Second}}, steps...)
}

func (p profile) rabbitmqStop() []stopStep {
	if p.throwaway {
		return stopAtOnce
	}
	return append([]stopStep{{syscall.SIGTERM, 20 * time.Second}}, stopAtOnce...)
}
