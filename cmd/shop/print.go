package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
)

// table prints rows in aligned columns under a heading.
type table struct{ *tabwriter.Writer }

func newTable(out io.Writer, heading ...any) table {
	t := table{tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)}
	t.row(heading...)
	return t
}

func (t table) row(cells ...any) {
	texts := make([]string, len(cells))
	for i, cell := range cells {
		texts[i] = cellText(cell)
	}
	fmt.Fprintln(t, strings.TrimRight(strings.Join(texts, "\t"), "\t"))
}

func cellText(cell any) string {
	switch cell := cell.(type) {
	case time.Time:
		return cell.UTC().Format("2006-01-02 15:04:05Z")
	case *time.Time:
		if cell == nil {
			return "-"
		}
		return cellText(*cell)
	}
	if text := plain(fmt.Sprint(cell)); text != "" {
		return text
	}
	return "-"
}

// plain escapes control characters: texts of messages come from untrusted senders, and a terminal would obey them.
func plain(text string) string {
	var shown strings.Builder
	for _, r := range text {
		if unicode.IsPrint(r) {
			shown.WriteRune(r)
		} else {
			shown.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
	}
	return shown.String()
}

// short cuts a text to at most limit runes, for a table.
func short(text string, limit int) string {
	if runes := []rune(text); len(runes) > limit {
		return string(runes[:limit-1]) + "…"
	}
	return text
}

// seconds returns a duration, rounded to seconds from a minute on.
func seconds(s float64) time.Duration {
	d := time.Duration(s * float64(time.Second))
	if d < time.Minute {
		return d.Round(time.Millisecond)
	}
	return d.Round(time.Second)
}

// count returns a number with its noun.
func count[N int | int64](n N, singular, plural string) string {
	if n == 1 {
		return "1 " + singular
	}
	return fmt.Sprintf("%d %s", n, plural)
}

// printJSON prints a value on one line, so that a command can print several.
func printJSON(value any) error {
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(value)
}

func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
