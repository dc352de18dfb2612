package app

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const alertsFolder = "../../deploy/prometheus"

func readText(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Every test of the alerts is repeated while other services, which are well, are scraped by the same Prometheus: it
// must come out the same.
func TestAlertsFireBesideHealthyServices(t *testing.T) {
	t.Parallel()
	if output, err := exec.Command("bash", "../../scripts/need.sh", "promtool", "prometheus").CombinedOutput(); err != nil {
		t.Fatalf("promtool: %v\n%s", err, output)
	}
	rules, err := filepath.Abs(filepath.Join(alertsFolder, "alerts.yml"))
	if err != nil {
		t.Fatal(err)
	}
	const begin = "\n    input_series:\n"
	tests := strings.Split(readText(t, filepath.Join(alertsFolder, "alerts_test.yml")), "\n  - name: ")
	if len(tests) < 4 || !strings.HasPrefix(tests[1], "nothing is wrong\n") || strings.Count(strings.Join(tests, ""), begin) != len(tests)-1 {
		t.Fatal("the first test must be of a service that is well, and each must have series")
	}
	var healthy strings.Builder
	own := fmt.Sprintf(`{job=%q,`, ServiceName)
	for _, line := range regexp.MustCompile(`(?m)^ +- \{series: .*$`).FindAllString(tests[1], -1) {
		if !strings.Contains(line, own) {
			t.Fatalf("a series is no job's, or not the first label says whose: %s", line)
		}
		for _, other := range []string{"billing", ServiceName + "-archive"} { // one name begins like ours
			healthy.WriteString(strings.Replace(line, own, fmt.Sprintf(`{job=%q,`, other), 1) + "\n")
		}
	}
	tests[0] = strings.Replace(tests[0], "rule_files: [alerts.yml]", fmt.Sprintf("rule_files: [%q]", rules), 1)
	beside := strings.ReplaceAll(strings.Join(tests, "\n  - name: "), begin, begin+healthy.String())
	path := filepath.Join(t.TempDir(), "beside.yml")
	if err := os.WriteFile(path, []byte(beside), 0o600); err != nil {
		t.Fatal(err)
	}
	if output, err := exec.CommandContext(t.Context(), "promtool", "test", "rules", path).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, output)
	}
}

var (
	aggregations = regexp.MustCompile(`\b(sum|min|max|avg|group|stddev|stdvar|count|count_values|topk|bottomk|quantile)\b *((?:by|without)? *\([^)]*\))`)
	byJob        = regexp.MustCompile(`^by \((.*, )?job(, .*)?\)$`)
	absences     = regexp.MustCompile(`\babsent(?:_over_time)?\([^)]*`)
)

// hides names what of an expression joins services, so that one that is well hides one that is ill.
func hides(expr string) (found []string) {
	for _, one := range aggregations.FindAllStringSubmatch(expr, -1) {
		if !byJob.MatchString(one[2]) {
			found = append(found, one[0])
		}
	}
	for _, one := range absences.FindAllString(expr, -1) {
		if !strings.Contains(one, `{job="`) {
			found = append(found, one)
		}
	}
	return found
}

func TestNoServiceHidesAnother(t *testing.T) {
	t.Parallel()
	var exprs []string
	for _, one := range regexp.MustCompile(`(?m)^ +expr: (.*)$`).FindAllStringSubmatch(readText(t, filepath.Join(alertsFolder, "alerts.yml")), -1) {
		exprs = append(exprs, one[1])
	}
	if len(exprs) < 10 {
		t.Fatalf("only %d alerts found", len(exprs))
	}
	for _, panel := range panels(t) {
		for _, target := range panel.Targets {
			exprs = append(exprs, target.Expr)
		}
	}
	for _, expr := range exprs {
		if found := hides(expr); found != nil {
			t.Errorf("%s: not by job, or of any: %q", expr, found)
		}
	}
	for _, bad := range []string{"max(a) > 1", "sum by (shard) (a)", "sum without (job) (a)", "absent(a)", `absent(a{job=~"b.*"})`, "max by (job) (a) / max by (jobs) (b)"} {
		if hides(bad) == nil {
			t.Errorf("%s passes", bad)
		}
	}
}
