package postgres

import (
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/session"
	"github.com/jackc/pgx/v5"
)

// encrypted is a Postgres server that requires TLS and client certificates.
type encrypted struct {
	admin              *pgx.Conn // made before the server required TLS
	url                string
	dir                string // the server's data directory
	cert, key, clients string // the server's files
}

func startEncrypted(t *testing.T, authority *testenv.Authority) *encrypted {
	t.Helper()
	e := new(encrypted)
	e.url, _ = testenv.Cluster(t)
	admin, err := pgx.Connect(t.Context(), e.url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { admin.Close(t.Context()) })
	e.admin = admin
	var hba string
	const filesSQL = `SELECT current_setting('data_directory'), current_setting('hba_file')`
	if err := admin.QueryRow(t.Context(), filesSQL).Scan(&e.dir, &hba); err != nil {
		t.Fatal(err)
	}
	e.cert, e.key = filepath.Join(e.dir, "test.crt"), filepath.Join(e.dir, "test.key")
	e.clients = filepath.Join(e.dir, "test.ca")
	e.certify(t, authority)
	rules := "local all all trust\nhostssl all all 127.0.0.1/32 trust clientcert=verify-ca\n"
	if err := os.WriteFile(hba, []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, setting := range []string{
		"ssl_cert_file = 'test.crt'", "ssl_key_file = 'test.key'", "ssl_ca_file = 'test.ca'", "ssl = on",
	} {
		e.exec(t, `ALTER SYSTEM SET `+setting)
	}
	e.exec(t, `SELECT pg_reload_conf()`)
	return e
}

// certify gives the server a certificate of the authority, and trusts the authority's clients.
func (e *encrypted) certify(t *testing.T, authority *testenv.Authority) {
	t.Helper()
	authority.Replace(t, e.cert, e.key, nil)
	testenv.Copy(t, authority.File, e.clients)
	info, err := os.Stat(e.dir)
	if err != nil {
		t.Fatal(err)
	}
	owner := info.Sys().(*syscall.Stat_t) // differs from the test's user if tests run as root
	for _, path := range []string{e.cert, e.key, e.clients} {
		if err := os.Chown(path, int(owner.Uid), int(owner.Gid)); err != nil {
			t.Fatal(err)
		}
	}
}

func (e *encrypted) exec(t *testing.T, sql string) {
	t.Helper()
	if _, err := e.admin.Exec(t.Context(), sql); err != nil {
		t.Fatal(err)
	}
}

// with returns the server's URL with settings.
func (e *encrypted) with(t *testing.T, settings map[string]string) string {
	t.Helper()
	parsed, err := url.Parse(e.url)
	if err != nil {
		t.Fatal(err)
	}
	query := parsed.Query()
	for name, value := range settings {
		query.Set(name, value)
	}
	parsed.RawQuery = query.Encode()
	return parsed.String()
}

func TestTLS(t *testing.T) {
	t.Parallel()
	authority, next := testenv.NewAuthority(t), testenv.NewAuthority(t)
	server := startEncrypted(t, authority)
	cert, key := authority.Issue(t, nil)
	root := filepath.Join(t.TempDir(), "root.pem")
	testenv.Copy(t, authority.File, root)
	good := map[string]string{"sslmode": "verify-full", "sslrootcert": root, "sslcert": cert, "sslkey": key}
	ask := func(settings map[string]string) error {
		conn, err := session.Connect(t.Context(), server.with(t, settings))
		if err != nil {
			return err
		}
		return conn.Close(t.Context())
	}
	testenv.Eventually(t, 20*time.Second, func() error { return ask(good) }) // the server reloads asynchronously

	db := open(t, Config{URL: server.with(t, good)})
	var encrypted bool
	const encryptedSQL = `SELECT ssl AND client_dn LIKE '%CN=test' FROM pg_stat_ssl WHERE pid = pg_backend_pid()`
	if err := db.QueryRow(t.Context(), encryptedSQL).Scan(&encrypted); err != nil || !encrypted {
		t.Errorf("encrypted with a client certificate: %t, %v", encrypted, err)
	}
	without := func(changes map[string]string) map[string]string {
		settings := map[string]string{}
		for name, value := range good {
			settings[name] = value
		}
		for name, value := range changes {
			settings[name] = value
			if value == "" {
				delete(settings, name)
			}
		}
		return settings
	}
	for name, settings := range map[string]map[string]string{
		"plain":                 {"sslmode": "disable"},
		"no client certificate": without(map[string]string{"sslcert": "", "sslkey": ""}),
		"an unknown authority":  without(map[string]string{"sslrootcert": next.File}),
	} {
		if err := ask(settings); err == nil {
			t.Errorf("%s: the server accepted the connection", name)
		}
	}

	// Replace all certificates, as happens once a year. Existing connections continue.
	server.certify(t, next)
	server.exec(t, `SELECT pg_reload_conf()`)
	next.Replace(t, cert, key, nil)
	testenv.Copy(t, next.File, root)
	testenv.Eventually(t, 20*time.Second, func() error { return ask(good) })
	db.Reset()
	if err := db.QueryRow(t.Context(), encryptedSQL).Scan(&encrypted); err != nil || !encrypted {
		t.Errorf("the pool with new certificates: %t, %v", encrypted, err)
	}

	// While only one of two files has been replaced, the pool uses the previous certificates.
	_, other := next.Issue(t, nil)
	testenv.Copy(t, other, key)
	db.Reset()
	if err := db.Ping(t.Context()); err != nil {
		t.Errorf("the pool with a key that does not fit its certificate: %v", err)
	}
}
