//go:build unix

package localstack

import (
	"maps"
	"slices"
)

// Status describes a profile.
type Status struct {
	Profile   string
	Stack     *Stack // nil unless both servers run
	Kept      bool   // by Up, until Down
	Processes []ProcessStatus
}

// ProcessStatus describes a recorded background process.
type ProcessStatus struct {
	Name    string // postgres, rabbitmq, epmd, watchdog, or a daemon's
	PID     int
	Running bool // false if the process ended without being stopped
	Log     string
}

// List returns the status of every profile with recorded background processes, in
// alphabetical order. It starts nothing. It reads records without a lock, so it shows a
// start or stop in progress as far as it has come.
func List(config Config) ([]Status, error) {
	var all []Status
	for _, name := range slices.Sorted(maps.Keys(profiles)) {
		config.Profile = name
		inst, err := newInstance(config)
		if err != nil {
			return nil, err
		}
		status, err := inst.status()
		if err != nil {
			return nil, err
		}
		if len(status.Processes) > 0 {
			all = append(all, status)
		}
	}
	return all, nil
}

func (i *instance) status() (Status, error) {
	names, err := i.records()
	if err != nil {
		return Status{}, err
	}
	i.readState()
	status := Status{Profile: i.profile.name, Kept: i.state.Keep}
	running := make(map[string]bool)
	for _, name := range names {
		process, alive := i.recorded(name)
		running[name] = alive
		status.Processes = append(status.Processes, ProcessStatus{
			Name: name, PID: process.PID, Running: alive, Log: i.logPath(name),
		})
	}
	if running[postgresName] && running[rabbitmqName] {
		status.Stack = i.stack()
	}
	return status, nil
}
