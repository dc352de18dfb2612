package outbox

import (
	"bytes"
	"errors"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"github.com/jackc/pgx/v5/pgxpool"
)

// TestRepair dumps a database while messages are in flight and restores it into a fresh cluster, where transaction IDs
// start again.
func TestRepair(t *testing.T) {
	t.Parallel()
	db, programs := testenv.OwnPostgres(t) // pg_dump must not be older than the server
	wantRepaired(t, db)
	open := openTx(t, db)
	insertIn(t, open, "k", "after the dump")
	late := openTx(t, db) // in progress at the batch's base, committed when the batch is read
	insertIn(t, late, "", "m000")
	fillProbesFrom(t, db, 1, 10)
	held, at, err := acquire(t.Context(), db, 0, "killed", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	r := newReader(db)
	r.at = at
	_, base := r.page(t)
	if err := held.move(t.Context(), progress{delivered: base.end, topID: base.rows[len(base.rows)-1].id}); err != nil {
		t.Fatal(err)
	}
	commitTx(t, late)
	fillProbesFrom(t, db, 10, 40)
	texts, first := r.page(t)
	equal(t, "first page of the batch", texts, append(numbered(1), numbered(19)[10:]...))
	if err := held.move(t.Context(), progress{delivered: first.end, topID: first.rows[len(first.rows)-1].id}); err != nil {
		t.Fatal(err)
	}

	restored := restore(t, db, programs)
	relay := NewRelay(restored, func() messaging.Publisher { return newBroker(0) }, Config{})
	err = relay.Run(t.Context())
	if !errors.Is(err, ErrForeignCluster) || !strings.Contains(err.Error(), "outbox repair") {
		t.Fatalf("error is %v", err)
	}
	insert(t, restored, "", "m040") // the service is already running
	equal(t, "to be published", repair(t, restored), 22)
	wantRepaired(t, restored)
	insert(t, restored, "", "m041")
	b := newBroker(23)
	start(t, restored, b, Config{PageRows: 10})
	await(t, "the undelivered messages", b.complete)
	want := numbered(42)[19:]
	if !slices.Equal(b.stored, want) {
		t.Errorf("published %v, want %v", b.stored, want)
	}
}

// restore copies a database into a fresh cluster with the Postgres programs of a directory.
func restore(t *testing.T, db *pgxpool.Pool, programs string) *pgxpool.Pool {
	t.Helper()
	url, _ := testenv.Cluster(t)
	run := func(in []byte, program string, args ...string) []byte {
		t.Helper()
		command := osexec.CommandContext(t.Context(), filepath.Join(programs, program), args...)
		var out, complaints bytes.Buffer
		command.Stdin, command.Stdout, command.Stderr = bytes.NewReader(in), &out, &complaints
		if err := command.Run(); err != nil {
			t.Fatalf("%s: %v\n%s", program, err, &complaints)
		}
		return out.Bytes()
	}
	roles := run(nil, "pg_dumpall", "--roles-only", "--no-role-passwords", "--dbname="+db.Config().ConnString())
	run(roles, "psql", "--quiet", "--dbname="+url) // ignores the error about the role that both clusters have
	dump := run(nil, "pg_dump", "--format=custom", "--dbname="+db.Config().ConnString())
	run(dump, "pg_restore", "--exit-on-error", "--dbname="+url)
	restored, err := pgxpool.New(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(restored.Close)
	return restored
}
