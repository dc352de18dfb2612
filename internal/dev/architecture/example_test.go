package architecture

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The demo places orders and reads all tables for its ledger.
func init() { programs = append(programs, "cmd/demo") }

var update = flag.Bool("update", false, "copy the numbers of docs/benchmarks.md into the pages that quote them")

// Pages quote benchmarks in tables of row, contestant, comparison, median and ratio. The numbers must be those of the
// last run.
func TestBenchmarksAreQuotedAsTheyAre(t *testing.T) {
	t.Parallel()
	measured := map[[3]string]string{} // the row as pages quote it
	for line := range strings.Lines(page(t, "benchmarks.md")) {
		if c := cellsOf(line); len(c) == 9 { // row, contestant, unit, median, spread, ratio, spread, to, wanted
			quote := fmt.Sprintf("| %s | %s | %s | %s %s | %s |\n", c[0], c[1], c[7], c[3], c[2], c[5])
			measured[[3]string{c[0], c[1], c[7]}] = strings.ReplaceAll(quote, "|  |", "| |")
		}
	}
	for _, name := range []string{"comparison.md", "scaling.md"} {
		var text strings.Builder
		quoted, inside := 0, false
		for line := range strings.Lines(page(t, name)) {
			c := cellsOf(line)
			inside = len(c) == 5 && (inside || c[0] == "Row")
			if inside && c[0] != "Row" && !strings.HasPrefix(c[0], "--") {
				quoted++
				found, ok := measured[[3]string{c[0], c[1], c[2]}]
				switch {
				case !ok:
					t.Errorf("docs/%s quotes a line that is not in docs/benchmarks.md: %s", name, line)
				case found != line && !*update:
					t.Errorf("docs/%s: got\n%swant\n%s(make docs copies it)", name, line, found)
				}
				if ok {
					line = found
				}
			}
			text.WriteString(line)
		}
		if quoted < 5 {
			t.Errorf("docs/%s: only %d numbers found", name, quoted)
		}
		if *update {
			if err := os.WriteFile(filepath.Join("..", "..", "..", "docs", name), []byte(text.String()),
				0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}
