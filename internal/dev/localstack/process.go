//go:build unix

package localstack

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// process is a process as it is recorded on disk. A pid alone is not enough: pids
// are reused, and the recorded one may belong to a stranger after a reboot.
type process struct {
	PID     int    `json:"pid"`
	Started string `json:"started"` // see startTime
}

// alive reports whether this very process still runs. A zombie does not: servers
// are never waited for, so one that ended stays a zombie as long as its starter
// lives.
func (p process) alive() bool {
	started, ok := startTime(p.PID)
	return ok && started == p.Started
}

// signal sends a signal, unless the process is gone.
func (p process) signal(signal syscall.Signal) error {
	// The handle comes before the check: on Linux it is a pidfd, which goes on
	// meaning the process that was checked even if the pid is reused meanwhile.
	handle, err := os.FindProcess(p.PID)
	if err != nil {
		return err
	}
	defer handle.Release()
	if !p.alive() {
		return os.ErrProcessDone
	}
	return handle.Signal(signal)
}

// signalAll signals the process and then everything that it started. Postgres gives each of its processes a session
// of its own, so that a group is not enough. A process that ended meanwhile is no error.
func (p process) signalAll(signal syscall.Signal, started []process) error {
	for _, one := range append([]process{p}, started...) {
		if err := one.signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return fmt.Errorf("signal process %d: %w", one.PID, err)
		}
	}
	return nil
}

// freeze suspends the process and everything that it started, and returns the latter. The process is suspended first:
// it starts nothing more while the others are looked for.
func (p process) freeze() (started []process, err error) {
	if err := p.signal(syscall.SIGSTOP); err != nil {
		return nil, err
	}
	if started, err = descendants(p.PID); err != nil {
		return nil, err
	}
	return started, p.signalAll(syscall.SIGSTOP, started)
}

// thaw undoes freeze.
func (p process) thaw() error {
	started, err := descendants(p.PID)
	if err != nil {
		return err
	}
	return p.signalAll(syscall.SIGCONT, started)
}

// kill ends the process and everything that it started, which has nobody left to stop it. It waits for the latter.
func (p process) kill() error {
	started, err := p.freeze()
	if err != nil {
		return err
	}
	// The group holds what outlived its parent. It is never empty while its leader lives, so its number cannot be a
	// stranger's.
	if err := syscall.Kill(-p.PID, syscall.SIGKILL); err != nil {
		return err
	}
	for _, one := range started {
		if err := one.signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return fmt.Errorf("signal process %d: %w", one.PID, err)
		}
		if !waitGone(one, killAfter) {
			return fmt.Errorf("process %d survived SIGKILL", one.PID)
		}
	}
	return nil
}

// stop signals the process, more and more firmly, until it is gone.
func (p process) stop(steps []stopStep) error {
	for _, step := range steps {
		send := func() error { return p.signal(step.signal) }
		if step.signal == syscall.SIGKILL {
			send = p.kill
		}
		if err := send(); errors.Is(err, os.ErrProcessDone) {
			return nil
		} else if err != nil {
			return fmt.Errorf("signal process %d: %w", p.PID, err)
		}
		if waitGone(p, step.patient) {
			// If it was our child, it is a zombie now; if not, this does nothing.
			_, _ = syscall.Wait4(p.PID, nil, syscall.WNOHANG, nil)
			return nil
		}
	}
	return fmt.Errorf("process %d survived SIGKILL", p.PID)
}

// waitGone polls, because the process need not be a child of this one.
func waitGone(p process, patient time.Duration) bool {
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for deadline := time.Now().Add(patient); time.Now().Before(deadline); <-ticker.C {
		if !p.alive() {
			return true
		}
	}
	return !p.alive()
}

// findDescendants returns the processes below pid in a table of parents, parents before their children.
func findDescendants(pid int, children map[int][]int) []process {
	var found []process
	for _, child := range children[pid] {
		if started, ok := startTime(child); ok {
			found = append(found, process{PID: child, Started: started})
			found = append(found, findDescendants(child, children)...)
		}
	}
	return found
}

// command is a background process to start.
type command struct {
	name    string   // of its record and its log
	argv    []string // argv[0] is a path
	env     []string
	dir     string
	account *account   // nil for the present user
	inherit []*os.File // becomes file 3 and so on
}

// gate is run by sh in front of each background process: it waits for a line on
// standard input before it becomes the command. The line is sent when the pid is
// safely recorded; if the starter is killed before that, the pipe closes and the
// command never runs. So there is no moment at which a server runs unrecorded.
const gate = `read -r go && exec "$@" </dev/null`

// spawn starts a detached process in a session of its own, with its output going
// to its log, and records it.
func (i *instance) spawn(c command) (process, error) {
	log, err := i.openLog(c.name)
	if err != nil {
		return process{}, err
	}
	defer log.Close()

	cmd := exec.Command("/bin/sh", append([]string{"-c", gate, "sh"}, c.argv...)...)
	cmd.Env, cmd.Dir, cmd.ExtraFiles = c.env, c.dir, c.inherit
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: c.account.credential()}
	opener, err := cmd.StdinPipe()
	if err != nil {
		return process{}, fmt.Errorf("start %s: %w", c.name, err)
	}
	defer opener.Close()
	if err := cmd.Start(); err != nil {
		return process{}, fmt.Errorf("start %s: %w", c.name, err)
	}
	// Not waited for: it outlives this process, and then belongs to init.
	defer cmd.Process.Release()

	started, ok := startTime(cmd.Process.Pid)
	if !ok {
		return process{}, fmt.Errorf("start %s: it ended at once", c.name)
	}
	p := process{PID: cmd.Process.Pid, Started: started}
	if err := writeJSON(i.recordPath(c.name), p); err != nil {
		return process{}, err
	}
	if _, err := opener.Write([]byte("go\n")); err != nil {
		return process{}, fmt.Errorf("start %s: %w", c.name, err)
	}
	return p, nil
}

// recorded returns the process of this name, if it still runs.
func (i *instance) recorded(name string) (process, bool) {
	var p process
	if err := readJSON(i.recordPath(name), &p); err != nil {
		return process{}, false
	}
	return p, p.alive()
}

// halt stops the process of this name, if it runs, and removes its record.
func (i *instance) halt(name string, steps []stopStep) error {
	if p, alive := i.recorded(name); alive {
		if err := p.stop(steps); err != nil {
			return fmt.Errorf("stop %s: %w", name, err)
		}
	}
	if err := os.Remove(i.recordPath(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove record: %w", err)
	}
	return nil
}

func (i *instance) recordPath(name string) string {
	return filepath.Join(i.dir, "run", name+".json")
}

// writeJSON replaces the file in one step, so that readers and crashes see either
// the old content or the new.
func writeJSON(path string, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	if err := os.WriteFile(path+".tmp", data, 0o644); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

func readJSON(path string, value any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, value)
}
