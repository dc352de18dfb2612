//go:build unix

// Package localstack runs a private Postgres and RabbitMQ for development and
// tests, without Docker, in a git-ignored folder of the checkout. It works on
// Linux and macOS.
//
// It guarantees:
//
//   - Servers run exactly as long as they have a user. Every user holds a shared
//     flock on a file, and a detached watchdog stops the servers when it gets the
//     exclusive lock. The kernel drops the locks of a killed process, so this is also
//     true for a user that is killed with SIGKILL. [Up] is the only exception: it
//     keeps them until [Down].
//   - It stops only processes that it started: by recorded pid, and only if that pid
//     still has the recorded start time.
//   - Everything listens only on the loopback interface, on ports that were free.
//   - A start never fails because of the remains of a crash: it takes over a running
//     server, and stops or cleans everything else first.
//   - If POSTGRES_URL and AMQP_URL are set, it uses those servers and starts nothing.
//
// It does not guarantee secrecy: both servers accept anyone who can reach the loopback
// interface of this machine. Nor does it keep the data of the test profile, which runs
// without fsync and starts empty each time.
package localstack

import (
	"context"
	"errors"
	"io"
	"os"
	"time"
)

// Config selects the servers. The zero value is the dev profile in the .stack folder of
// the current module.
type Config struct {
	// Dir is the folder for locks, logs and data. Default: the environment
	// variable STACK_DIR, else .stack next to the nearest go.mod above the
	// working directory, so that all packages of a module share one.
	Dir string

	// Profile is "dev" (durable, the default) or "test" (fast, thrown away).
	// Each has its own servers, ports and data, so a test run never disturbs
	// the servers for development.
	Profile string

	// Linger is the time that servers without users wait for the next user.
	// Default 0: the last release stops them before it returns. Tests need some
	// seconds, because `go test ./...` runs one binary after another and RabbitMQ
	// takes seven seconds to boot.
	Linger time.Duration

	// Log receives messages for a developer who waits, such as that packages are
	// being installed. Default: os.Stderr.
	Log io.Writer
}

// Stack is a running Postgres and RabbitMQ.
type Stack struct {
	PostgresURL   string // a superuser's URL of the database "shop"
	AMQPURL       string // an administrator's URL of the default vhost
	ManagementURL string // the HTTP API of RabbitMQ's management plugin, with credentials
	External      bool   // the servers come from the environment and are not ours to stop
}

// Environ returns the stack as NAME=value pairs, which the service, the tests and
// [Join] read.
func (s *Stack) Environ() []string {
	return []string{
		postgresVar + "=" + s.PostgresURL,
		amqpVar + "=" + s.AMQPURL,
		managementVar + "=" + s.ManagementURL,
	}
}

// Join starts the servers, or joins running ones, and returns when both answer. They
// stay up at least until release is called or this process ends. The caller must call
// release once. It logs problems to Config.Log.
//
// The caller's main must call [RunWatchdog] first. On failure the error ends with
// the last lines of the log of the server that did not start.
func Join(ctx context.Context, config Config) (stack *Stack, release func(), err error) {
	m, err := enter(ctx, config, false)
	if err != nil {
		return nil, nil, err
	}
	return m.stack, m.release, nil
}

// Up starts the servers, or joins running ones, and keeps them until [Down].
func Up(ctx context.Context, config Config) (*Stack, error) {
	m, err := enter(ctx, config, true)
	if err != nil {
		return nil, err
	}
	m.release()
	return m.stack, nil
}

// Down stops the daemons and then the servers of every profile, even if they are in
// use. It is not an error if nothing runs.
func Down(ctx context.Context, config Config) error {
	var errs []error
	for name := range profiles {
		config.Profile = name
		inst, err := newInstance(config)
		if err != nil {
			return err
		}
		errs = append(errs, inst.down(ctx))
	}
	return errors.Join(errs...)
}

// membership represents this process as a user of the servers.
type membership struct {
	stack    *Stack
	instance *instance // nil if the servers come from the environment
	use      *fileLock // shared
}

func (m *membership) release() {
	if m.instance != nil {
		m.instance.leave(m.use)
	}
}

// inherit returns the file to pass to a child so that it becomes a user too.
func (m *membership) inherit() []*os.File {
	if m.instance == nil {
		return nil
	}
	return []*os.File{m.use.file}
}

func enter(ctx context.Context, config Config, keep bool) (*membership, error) {
	if stack, err := fromEnvironment(os.Getenv); err != nil {
		return nil, err
	} else if stack != nil {
		return &membership{stack: stack}, nil
	}
	if !watchdogArmed {
		panic("localstack: main must call localstack.RunWatchdog first")
	}
	inst, err := newInstance(config)
	if err != nil {
		return nil, err
	}
	use, err := inst.enter(ctx, keep, config.Linger)
	if err != nil {
		return nil, err
	}
	return &membership{stack: inst.stack(), instance: inst, use: use}, nil
}
