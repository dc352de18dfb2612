// Package docs tests the examples in the documentation.
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

// firstXID and lastXID bound the transaction IDs on the page.
const firstXID, lastXID = 801, 899

var (
	// step matches a session's SQL and, if the page shows it, the output.
	step   = regexp.MustCompile("(?ms)^```sql (\\w+)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?")
	number = regexp.MustCompile(`\d+`)
)

// Each statement of the page's example, run in its session, prints the output that the page shows. The test needs a
// private cluster: with other users, transaction IDs would not be consecutive and snapshots would contain theirs.
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
	run("admin", "ALTER SYSTEM SET autovacuum = off") // it uses transaction IDs
	run("admin", "SELECT pg_reload_conf()")
	next, err := strconv.Atoi(strings.Fields(run("admin", "SELECT pg_snapshot_xmax(pg_current_snapshot())"))[1])
	if err != nil {
		t.Fatal(err)
	}
	steps, printed := step.FindAllStringSubmatch(string(text), -1), 0
	for _, match := range steps {
		session, sql, output := match[1], match[2], match[3]
		got := shift(run(session, shift(sql, firstXID, next)), next, firstXID)
		if want := strings.ReplaceAll(output, "|", " "); want != "" {
			printed++
			if strings.Join(strings.Fields(got), " ") != strings.Join(strings.Fields(want), " ") {
				t.Errorf("%s:\n%s\ngot\n%s\nwant\n%s", session, sql, got, want)
			}
		}
	}
	if len(steps) < 12 || printed < 6 {
		t.Errorf("only %d steps and %d results found", len(steps), printed)
	}
}

// sessions returns a function that runs SQL in a named session. It returns the column names and rows of the last result
// that has columns.
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
		for _, result := range results {
			if len(result.FieldDescriptions) == 0 {
				continue
			}
			var lines []string
			for _, field := range result.FieldDescriptions {
				lines = append(lines, field.Name)
			}
			lines = append(lines, "\n")
			for _, row := range result.Rows {
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

// shift replaces transaction IDs that count from the number from by IDs that count from to.
func shift(text string, from, to int) string {
	return number.ReplaceAllStringFunc(text, func(digits string) string {
		n, err := strconv.Atoi(digits)
		if err != nil || n < from || n > from+lastXID-firstXID {
			return digits
		}
		return strconv.Itoa(n - from + to)
	})
}
