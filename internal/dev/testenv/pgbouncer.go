//go:build unix

package testenv

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"example.com/shop/internal/dev/localstack"
	"github.com/jackc/pgx/v5"
)

// pgbouncerConfig configures transaction mode with so few server connections that clients must share them.
const pgbouncerConfig = `[databases]
* = host=%s port=%s user=%s password=%s
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %s
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 3
max_client_conn = 200
ignore_startup_parameters = extra_float_digits
`

// PgBouncer starts a pooler in transaction mode in front of a database's server, and returns the database's URL through
// it. It installs PgBouncer if it is missing. The pooler ends with the test, even if the test is killed. Every client
// connects as the user of the given URL.
func PgBouncer(t testing.TB, postgresURL string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startPatience)
	defer cancel()
	program, err := localstack.Require(ctx, os.Stderr, "pgbouncer", "pgbouncer")
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := url.Parse(postgresURL)
	if err != nil {
		t.Fatalf("parse postgres url: %v", err)
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(free.Addr().String())
	free.Close()
	config := filepath.Join(t.TempDir(), "pgbouncer.ini")
	password, _ := parsed.User.Password()
	content := fmt.Sprintf(pgbouncerConfig,
		parsed.Hostname(), parsed.Port(), parsed.User.Username(), cmp.Or(password, "none"), port)
	if err := os.WriteFile(config, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"-c", `"$@" & pid=$!; cat >/dev/null; kill -9 $pid; wait`, "sh", program, config}
	if os.Geteuid() == 0 {
		args = append(args, "-u", "nobody") // it refuses to run as root, and switches users after reading its file
	}
	command := exec.Command("sh", args...)
	log, err := os.Create(filepath.Join(t.TempDir(), "pgbouncer.log"))
	if err != nil {
		t.Fatal(err)
	}
	command.Stdout, command.Stderr = log, log
	lifeline, err := command.StdinPipe() // the shell kills the pooler when this pipe ends, at the latest with us
	if err == nil {
		err = command.Start()
	}
	if err != nil {
		t.Fatalf("start pgbouncer: %v", err)
	}
	t.Cleanup(func() {
		lifeline.Close()
		_ = command.Wait()
		log.Close()
		if content, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("pgbouncer:\n%s", content)
		}
	})
	parsed.Host = net.JoinHostPort("127.0.0.1", port)
	query := parsed.Query()
	query.Set("default_query_exec_mode", "cache_describe") // without prepared statements
	parsed.RawQuery = query.Encode()
	Eventually(t, 10*time.Second, func() error {
		conn, err := pgx.Connect(ctx, parsed.String())
		if err != nil {
			return err
		}
		return conn.Close(ctx)
	})
	return parsed.String()
}
