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

// process is the record of a process on disk. A pid alone is not enough: pids are
// reused, and after a reboot the recorded pid may belong to an unrelated process.
type process struct {
	PID     int    `json:"pid"`
	Started string `json:"started"` // see startTime
}

// alive reports whether this very process still runs. A zombie does not run. Nobody
// waits for servers, so an ended server stays a zombie until its starter ends.
func (p process) alive() bool {
	started, ok := startTime(p.PID)
	return ok && started == p.Started
}

// signal sends a signal, unless the process is gone.
func (p process) signal(signal syscall.Signal) error {
	// Open the handle before the check. On Linux it is a pidfd, which keeps referring to
	// the checked process even if the pid is reused meanwhile.
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

// signalAll signals the process and then its descendants. A signal to a process group would not reach all, because each
// Postgres process has its own session. It ignores processes that have ended meanwhile.
func (p process) signalAll(signal syscall.Signal, started []process) error {
	for _, target := range append([]process{p}, started...) {
		if err := target.signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return fmt.Errorf("signal process %d: %w", target.PID, err)
		}
	}
	return nil
}

// freeze suspends the process and its descendants, and returns the descendants. It suspends the process first, so that
// it starts no more while freeze looks for descendants.
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

// kill ends the process and its descendants, which nobody else would stop. It waits for the descendants.
func (p process) kill() error {
	started, err := p.freeze()
	if err != nil {
		return err
	}
	// The group contains processes that outlived their parent. Its leader still exists, so the number cannot belong to
	// an unrelated group.
	if err := syscall.Kill(-p.PID, syscall.SIGKILL); err != nil {
		return err
	}
	for _, child := range started {
		if err := child.signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return fmt.Errorf("signal process %d: %w", child.PID, err)
		}
		if !waitGone(child, killAfter) {
			return fmt.Errorf("process %d survived SIGKILL", child.PID)
		}
	}
	return nil
}

// stop signals the process, with increasing force, until it has ended.
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
		if waitGone(p, step.patience) {
			// Reap the zombie if the process was our child. Otherwise this does nothing.
			_, _ = syscall.Wait4(p.PID, nil, syscall.WNOHANG, nil)
			return nil
		}
	}
	return fmt.Errorf("process %d survived SIGKILL", p.PID)
}

// waitGone waits until the process has ended. It polls, because the process may not be a child of this one.
func waitGone(p process, patience time.Duration) bool {
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); <-ticker.C {
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
	account *account   // nil for the current user
	inherit []*os.File // descriptors 3 and up of the process
}

// latch runs in sh before each background process: it waits for a line on standard
// input and then becomes the command. The starter sends the line when the pid is safely
// recorded. If the starter is killed before that, the pipe closes and the command never
// runs. So a server never runs unrecorded.
const latch = `read -r go && exec "$@" </dev/null`

// spawn starts a detached process in its own session, writes its output to its log, and
// records it.
func (i *instance) spawn(c command) (process, error) {
	log, err := i.openLog(c.name)
	if err != nil {
		return process{}, err
	}
	defer log.Close()

	cmd := exec.Command("/bin/sh", append([]string{"-c", latch, "sh"}, c.argv...)...)
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
	// Do not wait for it: it outlives this process, and init adopts it.
	defer cmd.Process.Release()

	started, ok := startTime(cmd.Process.Pid)
	if !ok {
		return process{}, fmt.Errorf("start %s: it ended immediately", c.name)
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

// writeJSON replaces the file atomically, so that readers and crashes see either the
// old content or the new.
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
