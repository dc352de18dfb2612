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

// need installs a program of Prometheus if it is missing.
func need(t *testing.T, program string) {
	t.Helper()
	output, err := exec.Command("bash", "../../scripts/need.sh", program, "prometheus").CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", program, err, output)
	}
}

func readText(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// The alert rules pass all their tests also while the same Prometheus scrapes other, healthy services.
func TestAlertsFireBesideHealthyServices(t *testing.T) {
	t.Parallel()
	need(t, "promtool")
	rules, err := filepath.Abs(filepath.Join(alertsFolder, "alerts.yml"))
	if err != nil {
		t.Fatal(err)
	}
	const begin = "\n    input_series:\n"
	tests := strings.Split(readText(t, filepath.Join(alertsFolder, "alerts_test.yml")), "\n  - name: ")
	if len(tests) < 4 || !strings.HasPrefix(tests[1], "nothing is wrong\n") ||
		strings.Count(strings.Join(tests, ""), begin) != len(tests)-1 {
		t.Fatal("the first test must be of a healthy service, and each test must have series")
	}
	var healthy strings.Builder
	own := fmt.Sprintf(`{job=%q,`, ServiceName)
	for _, line := range regexp.MustCompile(`(?m)^ +- \{series: .*$`).FindAllString(tests[1], -1) {
		if !strings.Contains(line, own) {
			t.Fatalf("the first label of a series is not its job: %s", line)
		}
		for _, other := range []string{"billing", ServiceName + "-archive"} { // the latter begins with our name
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
	aggregations = regexp.MustCompile(
		`\b(sum|min|max|avg|group|stddev|stdvar|count|count_values|topk|bottomk|quantile)\b *` +
			`((?:by|without)? *\([^)]*\))`)
	byJob    = regexp.MustCompile(`^by \((.*, )?job(, .*)?\)$`)
	absences = regexp.MustCompile(`\babsent(?:_over_time)?\([^)]*`)
)

// hides returns the parts of an expression that combine services, so that a healthy one could hide a faulty one.
func hides(expr string) (found []string) {
	for _, match := range aggregations.FindAllStringSubmatch(expr, -1) {
		if !byJob.MatchString(match[2]) {
			found = append(found, match[0])
		}
	}
	for _, absence := range absences.FindAllString(expr, -1) {
		if !strings.Contains(absence, `{job="`) {
			found = append(found, absence)
		}
	}
	return found
}

func TestNoServiceHidesAnother(t *testing.T) {
	t.Parallel()
	var exprs []string
	rules := readText(t, filepath.Join(alertsFolder, "alerts.yml"))
	for _, match := range regexp.MustCompile(`(?m)^ +expr: (.*)$`).FindAllStringSubmatch(rules, -1) {
		exprs = append(exprs, match[1])
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
			t.Errorf("%s: not limited to one job: %q", expr, found)
		}
	}
	for _, bad := range []string{
		"max(a) > 1", "sum by (shard) (a)", "sum without (job) (a)", "absent(a)", `absent(a{job=~"b.*"})`,
		"max by (job) (a) / max by (jobs) (b)",
	} {
		if hides(bad) == nil {
			t.Errorf("%s is not detected", bad)
		}
	}
}
