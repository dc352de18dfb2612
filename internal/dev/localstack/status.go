//go:build unix

package localstack

import (
	"maps"
	"slices"
)

// Status is what is known about one profile without starting anything.
type Status struct {
	Profile   string
	Stack     *Stack // nil unless both servers run
	Kept      bool   // by Up, until Down
	Processes []ProcessStatus
}

// ProcessStatus is one recorded background process.
type ProcessStatus struct {
	Name    string // postgres, rabbitmq, epmd, watchdog, or a daemon's
	PID     int
	Running bool // false if it ended by itself
	Log     string
}

// List returns the status of every profile that has background processes on record, in alphabetical
// order. It reads records without a lock, so a start or stop under way shows as
// what is done so far.
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
