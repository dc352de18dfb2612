//go:build unix

package localstack

import (
	"context"
	"fmt"
	"net/url"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// Server is a private Postgres that its user may break. Its methods are not safe for concurrent use.
type Server struct {
	instance *instance
	use      *fileLock
}

// Cluster starts a Postgres without RabbitMQ, with its own folder and an empty database "shop". It ignores servers that
// the environment names. The caller must call Release.
func Cluster(ctx context.Context, config Config) (*Server, error) {
	return startServer(ctx, config, "")
}

// Standby starts a hot standby from a base backup of a running server, with its own folder. It streams from the server
// under the application name, which synchronous_standby_names may list. The caller must call Release.
func Standby(ctx context.Context, config Config, primary *Server, applicationName string) (*Server, error) {
	source, err := url.Parse(primary.URL())
	if err != nil {
		return nil, fmt.Errorf("parse primary's url: %w", err)
	}
	query := source.Query()
	query.Set("application_name", applicationName)
	source.RawQuery = query.Encode()
	return startServer(ctx, config, source.String())
}

func startServer(ctx context.Context, config Config, primary string) (*Server, error) {
	inst, err := newInstance(config)
	if err != nil {
		return nil, err
	}
	inst.alone, inst.primary = true, primary
	use, err := inst.enter(ctx, false, 0)
	if err != nil {
		return nil, err
	}
	return &Server{instance: inst, use: use}, nil
}

// URL returns a superuser's URL of the database "shop".
func (s *Server) URL() string { return s.instance.stack().PostgresURL }

// Programs returns the folder of the server's programs, such as pg_dump.
func (s *Server) Programs() string { return findPrograms().postgresTools() }

// Start restarts a stopped or killed server with its data, and waits until it answers.
func (s *Server) Start(ctx context.Context) error {
	start, err := s.instance.lockStart(ctx)
	if err != nil {
		return err
	}
	defer start.unlock()
	server, _, err := s.instance.servers(ctx)
	if err != nil {
		return err
	}
	if server.running(ctx) {
		return nil
	}
	if err := server.removePIDFile(); err != nil {
		return err
	}
	return server.boot(ctx, postgresName, server.attempt)
}

// Stop shuts the server down cleanly: the server disconnects its clients and writes a checkpoint.
func (s *Server) Stop(ctx context.Context) error {
	return s.halt(ctx, append([]stopStep{{syscall.SIGINT, 20 * time.Second}}, stopAtOnce...))
}

// Kill ends all processes of the server with SIGKILL, those of its sessions included.
func (s *Server) Kill(ctx context.Context) error { return s.halt(ctx, stopAtOnce) }

func (s *Server) halt(ctx context.Context, steps []stopStep) error {
	start, err := s.instance.lockStart(ctx)
	if err != nil {
		return err
	}
	defer start.unlock()
	return s.instance.halt(postgresName, steps)
}

// Freeze suspends all processes of the server with SIGSTOP. Its connections stay open but do not answer.
func (s *Server) Freeze() error {
	server, alive := s.instance.recorded(postgresName)
	if !alive {
		return errEnded
	}
	_, err := server.freeze()
	return err
}

// Thaw resumes a frozen server. It does nothing if the server is stopped.
func (s *Server) Thaw() error {
	server, alive := s.instance.recorded(postgresName)
	if !alive {
		return nil
	}
	return server.thaw()
}

// Promote makes a running standby a primary, and waits until it accepts writes.
func (s *Server) Promote(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, s.URL())
	if err != nil {
		return fmt.Errorf("promote standby: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var promoted bool
	err = conn.QueryRow(ctx, `SELECT pg_promote(true, $1)`, int(bootPatience.Seconds())).Scan(&promoted)
	if err == nil && !promoted {
		err = fmt.Errorf("still in recovery after %s", bootPatience)
	}
	if err != nil {
		return fmt.Errorf("promote standby: %w", err)
	}
	return nil
}

// Release stops the server and removes its data.
func (s *Server) Release() {
	if err := s.Thaw(); err != nil {
		fmt.Fprintf(s.instance.log, "localstack: thaw server: %v\n", err)
	}
	s.instance.leave(s.use)
}
