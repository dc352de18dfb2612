package architecture

import (
	"go/ast"
	"go/token"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// byHand are the places that compare a time with the database's clock by themselves, each with the reason why the time
// may be believed as it is. All others ask clock_holds, clock_within or clock_age, which believe nothing that is
// further in the future than it can be.
var byHand = []struct{ place, why string }{
	{"RETURN expires_at > clock_timestamp() AND expires_at <= clock_timestamp() + lease", "clock_holds itself"},
	{"RETURN happened_at > clock_timestamp() - span AND happened_at < clock_timestamp() + span", "clock_within itself"},
	{"RETURN greatest(clock_timestamp() - happened_at, interval '0')", "clock_age itself"},
	{"int8send((date_part('epoch', clock_timestamp() - outbox_oldest())", "the time in an ID, held between two bounds"},
	{"made_at < clock_timestamp() + outbox_most_ahead() AND made_at > clock_timestamp() - outbox_oldest()", "the same"},
	{"WHERE due_at <= clock_timestamp()", "outbox_scheduled: a time that the user gave, however far ahead"},
	{"present CONSTANT timestamptz := clock_timestamp();", "outbox_sweep: asks the rows of a slot as well, and believes them as far as the ring is long"},
	{"oldest CONSTANT timestamptz := clock_timestamp() - remember;", "inbox_sweep: rows of the future are kept, and inbox.ring.judge lets none in that are far ahead"},
	{"began CONSTANT timestamptz := clock_timestamp();", "operation_sweep, idempotency_key_sweep: what is dated ahead is kept for longer by as much"},
	{"OR clock_timestamp() > oldest + remember + interval '10 s'", "the end of a loop; after a step it ends early, or when nothing is left"},
	{"OR clock_timestamp() > began + interval '10 s'", "the same"},
	{"> clock_timestamp() THEN format( 'the cursor was moved", "outbox_repair: refuses what is ahead"},
	{"WHERE written_at > clock_timestamp() + $1", "outbox.Ahead, inbox.Ahead: look for what is ahead"},
	{"written_at - clock_timestamp()", "the same"},
	{"SELECT moved, next_due_at - clock_timestamp() FROM", "outbox.Relay.moveDue: waits for PollInterval at most"},
	{"WHERE consumer = $1 AND due_at <= statement_timestamp()", "inbox_retry: what is further ahead than a retry can be, inbox.Inbox.hasten makes due"},
	{"WHERE consumer = $1 AND due_at > clock_timestamp() + $2", "inbox.Inbox.hasten itself"},
	{"extract(epoch FROM clock_timestamp() - xact_start)", "holders: for people; a session's time is Postgres' own"},
	{"extract(epoch FROM clock_timestamp() - prepared)", "the same"},
}

const present = `(\b(clock|statement|transaction)_timestamp\(\)|\bnow\(\)|\bcurrent_timestamp\b)`

var compared = regexp.MustCompile(`(?i)([<>]=?|-|BETWEEN|:=)\s*` + present + `|` + present + `\s*([<>]=?|-|BETWEEN)`)

// The next column that holds a time must not be believed without a thought: a clock that is set back made the API
// refuse every write for half an hour.
func TestTimesAreComparedByTheClockFunctions(t *testing.T) {
	t.Parallel()
	texts := []string{schema(t)}
	for _, f := range files(t) {
		if f.test || slices.Contains(domain, f.dir) {
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
		for _, one := range byHand {
			if strings.Contains(text, one.place) {
				used[one.place] = true
				text = strings.ReplaceAll(text, one.place, "")
			}
		}
		for _, at := range compared.FindAllStringIndex(text, -1) {
			t.Errorf("a time is compared by hand: ...%s...", text[max(0, at[0]-60):min(len(text), at[1]+60)])
		}
	}
	for _, one := range byHand {
		if !used[one.place] {
			t.Errorf("nothing says %q any more", one.place)
		}
	}
}
