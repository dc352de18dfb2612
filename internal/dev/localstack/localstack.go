//go:build unix

// Package localstack runs a private Postgres and RabbitMQ for development and
// tests, without Docker, in a git-ignored folder of the checkout. It works on
// Linux and macOS.
//
// What it guarantees:
//
//   - Servers live exactly as long as somebody uses them. Every user holds a
//     shared flock on one file, and a detached watchdog that gets the exclusive
//     lock stops the servers. The kernel drops the locks of a killed process, so
//     this also holds when a user is killed with SIGKILL. [Up] is the one
//     exception: it keeps them until [Down].
//   - Only processes that this package started are stopped: by recorded pid, and
//     only if that pid still has the start time that was recorded with it.
//   - Everything listens on the loopback interface only, on ports that were free.
//   - A start never fails because of what a crash left behind: a live server is
//     taken over, anything else is stopped or cleaned first.
//   - If POSTGRES_URL and AMQP_URL are set, those servers are used and nothing is
//     started.
//
// It does not guarantee secrecy: both servers let in anyone who can reach the
// loopback interface of this machine. Nor does it keep data of the test profile,
// which runs without fsync and is made anew at each start.
package localstack

import (
	"context"
	"errors"
	"io"
	"os"
	"time"
)

// Config says which servers are wanted. The zero value is the dev profile in the
// .stack folder of the current module.
type Config struct {
	// Dir is the folder for locks, logs and data. Default: the environment
	// variable STACK_DIR, else .stack next to the nearest go.mod above the
	// working directory, so that all packages of a module share one.
	Dir string

	// Profile is "dev" (durable, the default) or "test" (fast, thrown away).
	// Each has its own servers, ports and data, so a test run never disturbs
	// what is being developed.
	Profile string

	// Linger is how long servers without users wait for the next one. Default 0:
	// the last release stops them before it returns. Tests want some seconds,
	// because `go test ./...` runs one binary after another and RabbitMQ takes
	// seven seconds to boot.
	Linger time.Duration

	// Log receives what a developer should know while waiting, such as packages
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

// Environ returns the stack as NAME=value pairs, as the service, the tests and
// [Join] itself read them.
func (s *Stack) Environ() []string {
	return []string{
		postgresVar + "=" + s.PostgresURL,
		amqpVar + "=" + s.AMQPURL,
		managementVar + "=" + s.ManagementURL,
	}
}

// Join starts the servers, or joins those that run, and returns when both answer.
// They stay up at least until release is called or this process ends. release
// must be called once; it reports problems to Config.Log.
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

// Up starts the servers, or joins those that run, and keeps them until [Down].
func Up(ctx context.Context, config Config) (*Stack, error) {
	m, err := enter(ctx, config, true)
	if err != nil {
		return nil, err
	}
	m.release()
	return m.stack, nil
}

// Down stops the daemons and then the servers of every profile, whoever still
// uses them. Nothing running is not an error.
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

// membership is the use of running servers by this process.
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

// inherit returns the lock in the form that makes a child a user, too.
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
