package architecture

import (
	"go/ast"
	"go/token"
	"regexp"
	"strings"
	"testing"
)

// exceptions lists the places that compare a time with the database's clock directly, each with the reason why the time
// is trustworthy. All other places call clock_holds, clock_within or clock_age, which reject times that are impossibly
// far in the future.
var exceptions = []struct{ place, why string }{
	{"RETURN expires_at > clock_timestamp() AND expires_at <= clock_timestamp() + lease", "clock_holds itself"},
	{"RETURN happened_at > clock_timestamp() - span AND happened_at < clock_timestamp() + span", "clock_within itself"},
	{"RETURN greatest(clock_timestamp() - happened_at, interval '0')", "clock_age itself"},
	{"int8send((date_part('epoch', clock_timestamp() - outbox_oldest())", "the time in an ID, kept between two bounds"},
	{"made_at < clock_timestamp() + outbox_most_ahead() AND made_at > clock_timestamp() - outbox_oldest()", "as above"},
	{"WHERE due_at <= clock_timestamp()", "outbox_scheduled: the user's time may be any time ahead"},
	{
		"present CONSTANT timestamptz := clock_timestamp();",
		"outbox_sweep: also checks the rows of a slot, and trusts them up to the length of the ring",
	},
	{
		"oldest CONSTANT timestamptz := clock_timestamp() - remember;",
		"inbox_sweep: keeps rows from the future, and inbox.ring.judge rejects those far ahead",
	},
	{
		"began CONSTANT timestamptz := clock_timestamp();",
		"operation_sweep, idempotency_key_sweep: keep rows from the future for longer",
	},
	{
		"OR clock_timestamp() > oldest + remember + interval '10 s'",
		"the end of a loop: a step of the clock ends it early, or it ends when nothing is left",
	},
	{"OR clock_timestamp() > began + interval '10 s'", "as above"},
	{"> clock_timestamp() THEN format( 'the cursor was moved", "outbox_repair: refuses a time ahead"},
	{"WHERE written_at > clock_timestamp() + $1", "outbox.Ahead, inbox.Ahead: look for times ahead"},
	{"written_at - clock_timestamp()", "as above"},
	{"SELECT moved, next_due_at - clock_timestamp() FROM", "outbox.Relay.moveDue: waits for PollInterval at most"},
	{
		"WHERE consumer = $1 AND due_at <= statement_timestamp()",
		"inbox_retry: inbox.Inbox.hasten makes rows due that are further ahead than a retry can be",
	},
	{"WHERE consumer = $1 AND due_at > clock_timestamp() + $2", "inbox.Inbox.hasten itself"},
	{"extract(epoch FROM clock_timestamp() - xact_start)",
		"holders: shown to people; a session's time is Postgres' own"},
	{"extract(epoch FROM clock_timestamp() - prepared)", "as above"},
}

const present = `(\b(clock|statement|transaction)_timestamp\(\)|\bnow\(\)|\bcurrent_timestamp\b)`

var compared = regexp.MustCompile(`(?i)([<>]=?|-|BETWEEN|:=)\s*` + present + `|` + present + `\s*([<>]=?|-|BETWEEN)`)

// Code must not trust the times in a column: a clock that was set back once made the API refuse every write for half an
// hour.
func TestTimesAreComparedByTheClockFunctions(t *testing.T) {
	t.Parallel()
	texts := []string{schema(t)}
	for _, f := range files(t) {
		if f.test || isDomain(f.dir) || isProgram(f) {
			continue
		}
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			if literal, ok := n.(*ast.BasicLit); ok && literal.Kind == token.STRING {
				texts = append(texts, literal.Value)
			}
			return true
		})
	}
	used := map[string]bool{}
	for _, text := range texts {
		text = strings.Join(strings.Fields(text), " ")
		for _, exception := range exceptions {
			if strings.Contains(text, exception.place) {
				used[exception.place] = true
				text = strings.ReplaceAll(text, exception.place, "")
			}
		}
		for _, at := range compared.FindAllStringIndex(text, -1) {
			t.Errorf("direct comparison with the clock: ...%s...", text[max(0, at[0]-60):min(len(text), at[1]+60)])
		}
	}
	for _, exception := range exceptions {
		if !used[exception.place] {
			t.Errorf("no SQL contains %q any more", exception.place)
		}
	}
}
