//go:build unix

package localstack

import (
	"syscall"
	"time"
)

// profile is one kind of servers. Profiles share nothing, so both can run at once.
type profile struct {
	name string

	// throwaway data is made anew at each start. That is what makes running
	// without fsync safe: nothing survives a power cut that could be corrupt. It
	// costs nothing either, since initdb takes one second and RabbitMQ boots for
	// seven meanwhile.
	throwaway bool

	// postgres holds settings on top of postgresSettings.
	postgres []string
}

var profiles = map[string]profile{
	// The demo and the benchmarks use dev, so it must keep what it commits.
	"dev": {name: "dev", postgres: []string{"fsync=on"}},
	"test": {name: "test", throwaway: true, postgres: []string{
		"fsync=off",
		"full_page_writes=off",
	}},
}

// postgresSettings are common to all profiles.
var postgresSettings = []string{
	"listen_addresses=127.0.0.1",
	// No socket: its path may have 107 bytes at most, and a checkout can be deep.
	"unix_socket_directories=",
	// Several test binaries, each with a few pools of parallel tests.
	"max_connections=300",
	// For two-phase commits: tests of the fault matrix leave prepared transactions
	// behind on purpose, and the default of 0 forbids them.
	"max_prepared_transactions=20",
	"synchronous_commit=on",
}

// stopStep is a signal and how long the process has to obey it.
type stopStep struct {
	signal  syscall.Signal
	patient time.Duration
}

// killAfter is long enough for the kernel to reap a killed process with much
// memory on a busy machine.
const killAfter = 5 * time.Second

// stopAtOnce is for what has nothing to save.
var stopAtOnce = []stopStep{{syscall.SIGKILL, killAfter}}

func (p profile) postgresStop() []stopStep {
	// "Immediate shutdown": no checkpoint. Data that is thrown away needs none.
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
