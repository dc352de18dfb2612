//go:build unix

// Command stack runs a private Postgres and RabbitMQ in the .stack folder of the
// checkout, without Docker.
//
//	stack -- COMMAND ARGS...               run COMMAND with servers, then stop them
//	stack up | down | status               keep servers running
//	stack daemon NAME -- COMMAND ARGS...   run COMMAND in the background until down
//
// COMMAND gets POSTGRES_URL, AMQP_URL and RABBITMQ_MANAGEMENT_URL. If the first two
// are already set, stack uses those servers and starts nothing.
//
// It exits with the status of COMMAND, 128+N if signal N killed it, 127 if it could
// not be started, 1 on its own errors and 2 on bad arguments.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/alecthomas/kong"

	"example.com/shop/internal/dev/localstack"
)

func main() {
	localstack.RunWatchdog()
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

const (
	exitFailure = 1
	exitUsage   = 2
)

// cli contains the arguments before "--".
type cli struct {
	Profile string `enum:"dev,test" default:"dev" help:"Servers to use: dev keeps its data, test is fast and does not."`

	Run    struct{} `cmd:"" default:"1" help:"Run a command with servers: stack [run] -- COMMAND ARGS..."`
	Up     struct{} `cmd:"" help:"Start the servers, keep them running and print their URLs as shell exports."`
	Down   struct{} `cmd:"" help:"Stop daemons and servers of all profiles."`
	Status struct{} `cmd:"" help:"Show what runs."`
	Daemon struct {
		Name string `arg:"" help:"Name of the log. A new daemon replaces the old one with the same name."`
	} `cmd:"" help:"Run a command in the background: stack daemon NAME -- COMMAND ARGS..."`
}

func run(args []string, stdout, stderr io.Writer) int {
	// Split here and not in kong, so that a COMMAND may be named "up" and have any flags.
	command := []string(nil)
	if dashes := slices.Index(args, "--"); dashes >= 0 {
		args, command = args[:dashes], args[dashes+1:]
	}
	var flags cli
	chosen, code := parse(&flags, args, command, stdout, stderr)
	if chosen == "" {
		return code
	}
	// A signal while servers start stops waiting for them; a second one kills.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)

	config := localstack.Config{Profile: flags.Profile, Log: stderr}
	var err error
	switch chosen {
	case "run":
		code, err = runCommand(ctx, config, command)
	case "up":
		err = up(ctx, config, stdout, stderr)
	case "down":
		err = localstack.Down(ctx, config)
	case "status":
		err = status(config, stdout)
	default:
		err = daemon(ctx, config, flags.Daemon.Name, command, stdout)
	}
	if err != nil {
		fmt.Fprintf(stderr, "stack: %v\n", err)
		code = max(code, exitFailure)
		if errors.Is(err, localstack.ErrBadName) {
			code = exitUsage
		}
	}
	return code
}

// parse returns the chosen subcommand, or the status to exit with if there is
// nothing left to do.
func parse(flags *cli, args, command []string, stdout, stderr io.Writer) (chosen string, code int) {
	helped := false
	parser := kong.Must(flags,
		kong.Name("stack"),
		kong.Description("A private Postgres and RabbitMQ in the .stack folder of the checkout."),
		kong.Writers(stdout, stderr),
		kong.Exit(func(int) { helped = true }))
	parsed, err := parser.Parse(args)
	if helped {
		return "", 0
	}
	if err == nil {
		chosen, _, _ = strings.Cut(parsed.Command(), " ")
		err = checkCommand(chosen, command)
	}
	if err != nil {
		fmt.Fprintf(stderr, "stack: %v\n", err)
		return "", exitUsage
	}
	return chosen, 0
}

// checkCommand checks that the subcommand has a command after "--" if it needs one.
func checkCommand(chosen string, command []string) error {
	switch wants := chosen == "run" || chosen == "daemon"; {
	case wants && len(command) == 0:
		return errors.New("no command: want -- COMMAND ARGS... (see stack --help)")
	case !wants && len(command) > 0:
		return fmt.Errorf("%s takes no command", chosen)
	}
	return nil
}

func up(ctx context.Context, config localstack.Config, stdout, stderr io.Writer) error {
	stack, err := localstack.Up(ctx, config)
	if err != nil {
		return err
	}
	if stack.External {
		fmt.Fprintln(stderr, "stack: the environment names running servers, so nothing was started")
	}
	for _, variable := range stack.Environ() {
		name, value, _ := strings.Cut(variable, "=")
		fmt.Fprintf(stdout, "export %s='%s'\n", name, value)
	}
	return nil
}

func status(config localstack.Config, stdout io.Writer) error {
	all, err := localstack.List(config)
	if err != nil {
		return err
	}
	if len(all) == 0 {
		fmt.Fprintln(stdout, "nothing runs")
		return nil
	}
	table := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	for _, status := range all {
		for _, process := range status.Processes {
			condition := "running"
			if !process.Running {
				condition = "ended"
			}
			fmt.Fprintf(table, "%s\t%s\t%s\tpid %d\t%s\n",
				status.Profile, process.Name, condition, process.PID, process.Log)
		}
		if status.Stack != nil {
			for _, variable := range status.Stack.Environ() {
				fmt.Fprintf(table, "%s\t%s\n", status.Profile, variable)
			}
		}
	}
	return table.Flush()
}

func daemon(ctx context.Context, config localstack.Config, name string, command []string, stdout io.Writer) error {
	pid, err := localstack.Daemon(ctx, config, name, command)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s started, pid %d\n", name, pid)
	return nil
}
