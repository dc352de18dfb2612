//go:build unix

package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// plainInterval is the interval between progress lines where they cannot be overwritten.
const plainInterval = 2 * time.Second

// barWidth leaves room for the numbers on a terminal of 80 columns.
const barWidth = 12

const (
	eraseLine = "\r\x1b[K"
	green     = "\x1b[32m"
	red       = "\x1b[31m"
	dim       = "\x1b[2m"
	reset     = "\x1b[0m"
)

// screen prints events. On a terminal its last line shows the progress and is overwritten.
type screen struct {
	out     io.Writer
	live    bool
	colors  bool
	started time.Time

	mu       sync.Mutex
	status   string // the current progress line on the terminal
	lastLine time.Time
}

func newScreen(out *os.File) *screen {
	info, err := out.Stat()
	live := err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"
	return &screen{out: out, live: live, colors: live && os.Getenv("NO_COLOR") == "", started: time.Now()}
}

func (s *screen) elapsed() time.Duration { return time.Since(s.started) }

// event prints a line with the time since the start.
func (s *screen) event(format string, args ...any) {
	s.line(s.color(dim, fmt.Sprintf("%6.1f s", s.elapsed().Seconds())) + "  " + fmt.Sprintf(format, args...))
}

// note prints a line without a time.
func (s *screen) note(format string, args ...any) {
	s.line("          " + fmt.Sprintf(format, args...))
}

// verdict prints the last line.
func (s *screen) verdict(good bool, format string, args ...any) {
	color := red
	if good {
		color = green
	}
	s.line("\n  " + s.color(color, fmt.Sprintf(format, args...)))
}

// block prints a text and colors its marks.
func (s *screen) block(text string) {
	s.line(strings.NewReplacer(good, s.color(green, good), bad, s.color(red, bad)).Replace(text))
}

func (s *screen) line(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.status != "" {
		fmt.Fprint(s.out, eraseLine)
	}
	fmt.Fprintln(s.out, text)
	fmt.Fprint(s.out, s.status)
}

// progress shows the progress. share is the part of the load that is done.
func (s *screen) progress(text string, share float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live {
		full := min(int(share*barWidth), barWidth)
		bar := s.color(green, strings.Repeat("█", full)) + s.color(dim, strings.Repeat("░", barWidth-full))
		s.status = "  " + bar + "  " + text
		fmt.Fprint(s.out, eraseLine+s.status)
		return
	}
	if time.Since(s.lastLine) >= plainInterval {
		s.lastLine = time.Now()
		fmt.Fprintf(s.out, "%6.1f s  %3.0f %%  %s\n", s.elapsed().Seconds(), share*100, text)
	}
}

func (s *screen) endProgress() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.status != "" {
		fmt.Fprint(s.out, eraseLine)
		s.status = ""
	}
}

func (s *screen) color(code, text string) string {
	if !s.colors {
		return text
	}
	return code + text + reset
}

// grouped writes 12345 as 12,345.
func grouped(n int) string {
	text := strconv.Itoa(n)
	for at := len(text) - 3; at > 0 && text[at-1] != '-'; at -= 3 {
		text = text[:at] + "," + text[at:]
	}
	return text
}
