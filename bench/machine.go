package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"example.com/shop/internal/rabbit"
	"github.com/jackc/pgx/v5"
)

// describeMachine names the hardware and the versions that the numbers were measured with.
func describeMachine(ctx context.Context, f *flags) (string, error) {
	conn, err := pgx.Connect(ctx, f.PostgresURL)
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx)
	var postgres string
	const versionSQL = `SELECT split_part(current_setting('server_version'), ' ', 1)`
	if err := conn.QueryRow(ctx, versionSQL).Scan(&postgres); err != nil {
		return "", err
	}
	broker, err := rabbit.Version(ctx, f.AMQPURL)
	if err != nil {
		return "", err
	}
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return fmt.Sprintf("%s, %d cores, Linux %s, %s, Postgres %s, %s, all on this one machine",
		field("/proc/cpuinfo", "model name"), runtime.NumCPU(), strings.TrimSpace(string(kernel)), runtime.Version(),
		postgres, broker), nil
}

// field returns the first value of a "name: value" line in a file of /proc.
func field(file, name string) string {
	text, _ := os.ReadFile(file)
	for text := range strings.Lines(string(text)) {
		if key, value, found := strings.Cut(text, ":"); found && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return "?"
}

// maxRSS returns the peak resident memory of a process in MiB.
func maxRSS(pid int) float64 {
	kib, _ := strconv.ParseFloat(strings.TrimSuffix(field(fmt.Sprintf("/proc/%d/status", pid), "VmHWM"), " kB"), 64)
	return kib / 1024
}

// ticks is the unit of CPU time in /proc: USER_HZ, which is 100 on every Linux architecture that Go runs on.
const ticks = 100

// cpuTime returns the CPU time of a process in user mode and in the kernel.
func cpuTime(pid int) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// Skip the PID and the name, which is in parentheses and may contain anything. utime and stime are fields 14 and 15.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if fields[0] == "Z" {
		return 0, fmt.Errorf("process %d has ended", pid)
	}
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * time.Second / ticks, nil
}
