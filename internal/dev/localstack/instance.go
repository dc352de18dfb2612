//go:build unix

package localstack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// instance runs the servers of a profile. On disk it is a folder:
//
//	start.lock     held while servers are started or stopped
//	use.lock       held shared by every user
//	watchdog.lock  held by the watchdog
//	state.json     see state
//	run/           one record per background process
//	log/           one log per background process
//	servers/       the data, unless placeData had to put it elsewhere
//
// A process must hold start.lock to take use.lock exclusively. So a user that holds
// start.lock gets the shared lock immediately, and nobody can stop servers between a
// user's decision to join them and its joining.
type instance struct {
	profile profile
	dir     string
	log     io.Writer
	// alone leaves RabbitMQ out.
	alone bool
	// primary is the URL of the primary if the Postgres is a standby.
	primary string

	mu    sync.Mutex // guards the ports while both servers start
	state state      // as of the last time that start.lock was held
}

// state outlives the process that started the servers.
type state struct {
	Data   string        `json:"data"`   // folder of the data
	Keep   bool          `json:"keep"`   // started by Up: only Down stops it
	Linger time.Duration `json:"linger"` // of the latest user

	Postgres     int `json:"postgres"` // ports
	AMQP         int `json:"amqp"`
	Management   int `json:"management"`
	Distribution int `json:"distribution"`
	EPMD         int `json:"epmd"`
}

func (s *state) ports() []int {
	return []int{s.Postgres, s.AMQP, s.Management, s.Distribution, s.EPMD}
}

func newInstance(config Config) (*instance, error) {
	name := config.Profile
	if name == "" {
		name = "dev"
	}
	chosen, ok := profiles[name]
	if !ok {
		return nil, fmt.Errorf("unknown profile %q: want one of %s", name,
			strings.Join(slices.Sorted(maps.Keys(profiles)), ", "))
	}
	dir, err := stackDir(config.Dir)
	if err != nil {
		return nil, err
	}
	log := config.Log
	if log == nil {
		log = os.Stderr
	}
	return &instance{profile: chosen, dir: filepath.Join(dir, name), log: log}, nil
}

// stackDir returns the absolute path of the folder of all instances.
func stackDir(configured string) (string, error) {
	if configured == "" {
		configured = os.Getenv(dirVar)
	}
	if configured != "" {
		return filepath.Abs(configured)
	}
	working, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find working directory: %w", err)
	}
	for dir := working; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, ".stack"), nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("no go.mod in %s or above it: set %s to a folder for the servers", working, dirVar)
		}
	}
}

// enter takes the shared lock and makes sure that the servers run.
func (i *instance) enter(ctx context.Context, keep bool, linger time.Duration) (*fileLock, error) {
	start, err := i.lockStart(ctx)
	if err != nil {
		return nil, err
	}
	defer start.unlock()
	use, err := tryLock(i.path("use.lock"), lockShared)
	if err != nil {
		return nil, err
	}
	if use == nil {
		return nil, fmt.Errorf("another program has locked %s", i.path("use.lock"))
	}
	if err := i.ensure(ctx, keep, linger); err != nil {
		use.unlock()
		// Half a stack is useless. Stop it unless others use it.
		return nil, errors.Join(err, i.stopUnused())
	}
	return use, nil
}

// ensure starts the servers that do not run. The caller must hold start.lock.
func (i *instance) ensure(ctx context.Context, keep bool, linger time.Duration) error {
	postgres, rabbitmq, err := i.servers(ctx)
	if err != nil {
		return err
	}
	postgresRuns, rabbitmqRuns := postgres.running(ctx), rabbitmq.running(ctx)
	// If a kept stack has ended, for instance with the machine, the next user that
	// starts it does not keep it.
	kept := i.state.Keep && (postgresRuns || rabbitmqRuns)
	i.state.Keep, i.state.Linger = keep || kept, linger
	if err := writeJSON(i.path("state.json"), i.state); err != nil {
		return err
	}
	// Start the watchdog before the servers. It must stop them if this process is
	// killed while they boot.
	if !i.state.Keep {
		if err := i.ensureWatchdog(); err != nil {
			return err
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	if !postgresRuns {
		group.Go(func() error { return postgres.start(ctx) })
	}
	if !rabbitmqRuns && !i.alone {
		group.Go(func() error { return rabbitmq.start(ctx) })
	}
	return group.Wait()
}

// servers prepares both servers: it finds the programs and the accounts, and makes the
// folder for the data.
func (i *instance) servers(ctx context.Context) (*postgres, *rabbitmq, error) {
	programs, err := ensurePrograms(ctx, i.log)
	if err != nil {
		return nil, nil, err
	}
	postgresAccount, err := serverAccount("postgres")
	if err != nil {
		return nil, nil, err
	}
	rabbitmqAccount, err := serverAccount("rabbitmq")
	if err != nil {
		return nil, nil, err
	}
	if i.state.Data, err = placeData(i.dir, postgresAccount, rabbitmqAccount); err != nil {
		return nil, nil, err
	}
	return &postgres{instance: i, programs: programs, account: postgresAccount},
		&rabbitmq{instance: i, programs: programs, account: rabbitmqAccount}, nil
}

// leave releases the shared lock. Without a linger time it also stops the servers if
// nobody uses them any more.
func (i *instance) leave(use *fileLock) {
	use.unlock()
	if i.state.Linger > 0 {
		return // the watchdog stops them
	}
	// This is long enough to stop both. Otherwise the watchdog does it.
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	start, err := i.lockStart(ctx)
	if err == nil {
		err = i.stopUnused()
		start.unlock()
	}
	if err != nil {
		fmt.Fprintf(i.log, "localstack: stop servers: %v\n", err)
	}
}

// stopUnused stops the servers unless they are used or kept. The caller must hold
// start.lock.
func (i *instance) stopUnused() error {
	if i.state.Keep {
		return nil
	}
	use, err := tryLock(i.path("use.lock"), lockExclusive)
	if use == nil || err != nil {
		return err
	}
	defer use.unlock()
	return errors.Join(i.stopServers(), i.halt(watchdogName, stopAtOnce))
}

// down stops everything in this instance, used or not.
func (i *instance) down(ctx context.Context) error {
	if _, err := os.Stat(i.dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	start, err := i.lockStart(ctx)
	if err != nil {
		return err
	}
	defer start.unlock()
	i.state.Keep = false
	return errors.Join(
		i.stopDaemons(),
		i.stopServers(),
		i.halt(watchdogName, stopAtOnce),
		writeJSON(i.path("state.json"), i.state),
	)
}

func (i *instance) stopServers() error {
	var group errgroup.Group
	group.Go(func() error { return i.halt(postgresName, i.profile.postgresStop()) })
	group.Go(i.stopRabbitMQ)
	return errors.Join(group.Wait(), i.discard())
}

// discard removes throwaway data, which may be in a shared folder for temporary files.
// It keeps the logs.
func (i *instance) discard() error {
	if !i.profile.throwaway || i.state.Data == "" {
		return nil
	}
	// Remove by name and not the whole folder, because the path comes from a file.
	for _, name := range []string{postgresName, postgresName + ".new", rabbitmqName} {
		if err := os.RemoveAll(filepath.Join(i.state.Data, name)); err != nil {
			return fmt.Errorf("remove data: %w", err)
		}
	}
	if err := os.Remove(i.state.Data); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove data: %w", err)
	}
	return nil
}

// lockStart takes start.lock and reads the state that it protects.
func (i *instance) lockStart(ctx context.Context) (*fileLock, error) {
	for _, dir := range []string{"run", "log"} {
		if err := os.MkdirAll(i.path(dir), 0o755); err != nil {
			return nil, fmt.Errorf("make folder: %w", err)
		}
	}
	lock, err := waitLock(ctx, i.path("start.lock"), lockExclusive)
	if err != nil {
		return nil, err
	}
	i.readState()
	return lock, nil
}

// readState starts with an empty state if none is readable. Everything in it can be
// chosen again.
func (i *instance) readState() {
	i.state = state{}
	if err := readJSON(i.path("state.json"), &i.state); err != nil {
		i.state = state{}
	}
}

func (i *instance) stack() *Stack {
	return &Stack{
		PostgresURL:   postgresURL(i.state.Postgres, "shop"),
		AMQPURL:       brokerURL("amqp", i.state.AMQP) + "/",
		ManagementURL: brokerURL("http", i.state.Management),
	}
}

func (i *instance) path(name string) string { return filepath.Join(i.dir, name) }

func (i *instance) logPath(name string) string { return filepath.Join(i.dir, "log", name+".log") }

// openLog begins a new log and keeps the previous one, which shows why a restart was
// needed.
func (i *instance) openLog(name string) (*os.File, error) {
	path := i.logPath(name)
	if err := os.Rename(path, path+".old"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("rotate log: %w", err)
	}
	log, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return log, nil
}

// logTail returns the last lines of a log, for error messages.
func (i *instance) logTail(name string) string {
	const lines = 20
	data, err := os.ReadFile(i.logPath(name))
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(bytes.TrimSpace(data), []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}
