// Package docs holds the test that runs what docs/outbox.md shows.
package docs

import (
	"context"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/migrations"
	"github.com/jackc/pgx/v5"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// firstXID and lastXID are between what the page has for transaction IDs.
const firstXID, lastXID = 801, 899

var (
	// step is a session's SQL and, if the page says so, what it prints.
	step   = regexp.MustCompile("(?ms)^```sql (\\w+)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?")
	number = regexp.MustCompile(`\d+`)
)

// The page's example prints what the page says: statement by statement, each in its session. It has a cluster of its own, for in one that others work in
// transaction IDs would not be consecutive, and snapshots would name theirs.
func TestTheExampleOfTheOutbox(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("outbox.md")
	if err != nil {
		t.Fatal(err)
	}
	url, _ := testenv.Cluster(t)
	if _, err := migrations.Up(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	run := sessions(t, url)
	run("admin", "ALTER SYSTEM SET autovacuum = off") // it has transactions of its own
	run("admin", "SELECT pg_reload_conf()")
	next, err := strconv.Atoi(strings.Fields(run("admin", "SELECT pg_snapshot_xmax(pg_current_snapshot())"))[1])
	if err != nil {
		t.Fatal(err)
	}
	steps, printed := step.FindAllStringSubmatch(string(text), -1), 0
	for _, one := range steps {
		got := shift(run(one[1], shift(one[2], firstXID, next)), next, firstXID)
		if want := strings.ReplaceAll(one[3], "|", " "); want != "" {
			printed++
			if strings.Join(strings.Fields(got), " ") != strings.Join(strings.Fields(want), " ") {
				t.Errorf("%s:\n%s\nprints\n%s\nand not\n%s", one[1], one[2], got, want)
			}
		}
	}
	if len(steps) < 12 || printed < 6 {
		t.Errorf("only %d steps and %d results found", len(steps), printed)
	}
}

// sessions returns a function that runs SQL in the session of a name, and returns the last result that has columns: their names, and the rows.
func sessions(t *testing.T, url string) func(session, sql string) string {
	conns := map[string]*pgx.Conn{}
	return func(session, sql string) (printed string) {
		if conns[session] == nil {
			conn, err := pgx.Connect(t.Context(), url)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
			conns[session] = conn
		}
		results, err := conns[session].PgConn().Exec(t.Context(), sql).ReadAll()
		if err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
		for _, one := range results {
			if len(one.FieldDescriptions) == 0 {
				continue
			}
			var lines []string
			for _, field := range one.FieldDescriptions {
				lines = append(lines, field.Name)
			}
			lines = append(lines, "\n")
			for _, row := range one.Rows {
				for _, value := range row {
					lines = append(lines, string(value))
				}
				lines = append(lines, "\n")
			}
			printed = strings.Join(lines, " ")
		}
		return printed
	}
}

// shift gives transaction IDs that count from one number those that count from another.
func shift(text string, from, to int) string {
	return number.ReplaceAllStringFunc(text, func(digits string) string {
		n, err := strconv.Atoi(digits)
		if err != nil || n < from || n > from+lastXID-firstXID {
			return digits
		}
		return strconv.Itoa(n - from + to)
	})
}
