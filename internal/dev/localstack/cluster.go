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

// Server is a Postgres of its user's own, to be broken as the user likes. Call one method at a time.
type Server struct {
	instance *instance
	use      *fileLock
}

// Cluster starts a Postgres by itself in a folder of its own, whatever the environment names, with an empty database
// "shop". The caller calls Release in the end.
func Cluster(ctx context.Context, config Config) (*Server, error) {
	return startServer(ctx, config, "")
}

// Standby starts a hot standby of a running server from a base backup of it, in a folder of its own. It streams from
// the server under the application name, which synchronous_standby_names may list. The caller calls Release in the end.
func Standby(ctx context.Context, config Config, primary *Server, applicationName string) (*Server, error) {
	named, err := url.Parse(primary.URL())
	if err != nil {
		return nil, fmt.Errorf("parse primary's url: %w", err)
	}
	query := named.Query()
	query.Set("application_name", applicationName)
	named.RawQuery = query.Encode()
	return startServer(ctx, config, named.String())
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

// URL is a superuser's URL of the database "shop".
func (s *Server) URL() string { return s.instance.stack().PostgresURL }

// Programs is the folder of the server's programs, pg_dump among them.
func (s *Server) Programs() string { return findPrograms().postgresTools() }

// Start starts a stopped or killed server with the data that it has, and waits until it answers.
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

// Stop shuts the server down in order: it disconnects its clients and writes a checkpoint.
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

// Freeze suspends all processes of the server with SIGSTOP. Its connections stay open, and nothing answers.
func (s *Server) Freeze() error {
	server, alive := s.instance.recorded(postgresName)
	if !alive {
		return errEnded
	}
	_, err := server.freeze()
	return err
}

// Thaw lets a frozen server go on. It does nothing to one that is stopped.
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
		err = fmt.Errorf("it is still in recovery after %s", bootPatience)
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
