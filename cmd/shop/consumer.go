package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"example.com/shop/internal/app"
	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/inbox"
)

// noteFlags are those of commands that change something.
type noteFlags struct {
	Reason string `required:"" help:"Why, for the audit log."`
	Actor  string `help:"Who, for the audit log. Default: the name logged in with." placeholder:"NAME"`
}

func (f *noteFlags) AfterApply() error {
	f.Actor = person(f.Actor)
	switch {
	case strings.TrimSpace(f.Reason) == "":
		return errors.New("--reason: is empty; it is kept in the audit log")
	case f.Actor == "":
		return errors.New("--actor: is not given, and nobody is logged in; it is kept in the audit log")
	}
	return nil
}

func (f *noteFlags) note() deadletter.Note { return deadletter.Note{Actor: f.Actor, Reason: f.Reason} }

// done says what was done.
func (f *deskFlags) done(format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	if f.JSON {
		return printJSON(map[string]string{"done": text})
	}
	_, err := fmt.Println(plain(text))
	return err
}

type consumerLsCommand struct{ deskFlags }

// groupView is a group as it is printed.
type groupView struct {
	Group     string   `json:"group"`
	Processes int      `json:"processes"`
	PausedBy  string   `json:"paused_by,omitempty"`
	Why       string   `json:"why,omitempty"`
	Retrying  int64    `json:"retrying"`
	Oldest    float64  `json:"oldest_seconds"`
	Blocked   int64    `json:"blocked_keys"`
	Lag       *float64 `json:"lag_seconds"`
}

// mostKeys is how many blocked keys are listed.
const mostKeys = 100

func (c *consumerLsCommand) Run(ctx context.Context) error {
	return c.work(ctx, func(desk *app.Admin) error {
		standings, err := inbox.GroupStatuses(ctx, desk.DB, desk.Acts().Groups)
		if err != nil {
			return err
		}
		keys, err := inbox.Blocked(ctx, desk.DB, mostKeys)
		if err != nil {
			return err
		}
		groups := make([]groupView, len(standings))
		for i, one := range standings {
			groups[i] = groupView{one.Consumer, len(one.Applied), "", "", one.Retrying, one.Oldest, one.Blocked, one.Lag}
			if one.Paused != nil {
				groups[i].PausedBy, groups[i].Why = one.Paused.Actor, one.Paused.Reason
			}
		}
		if c.JSON {
			return printJSON(map[string]any{"groups": groups, "blocked_keys": append([]inbox.BlockedKey{}, keys...)})
		}
		return printGroups(os.Stdout, groups, keys)
	})
}

func printGroups(out io.Writer, groups []groupView, keys []inbox.BlockedKey) error {
	t := newTable(out, "GROUP", "STATE", "PROCESSES", "RETRYING", "OLDEST", "BLOCKED KEYS")
	for _, one := range groups {
		state := "runs"
		switch {
		case one.PausedBy != "":
			state = fmt.Sprintf("paused by %s: %s", one.PausedBy, one.Why)
		case one.Processes == 0:
			state = "no process runs it"
		}
		t.row(one.Group, state, one.Processes, one.Retrying, seconds(one.Oldest), one.Blocked)
	}
	if err := t.Flush(); err != nil || len(keys) == 0 {
		return err
	}
	fmt.Fprintln(out)
	t = newTable(out, "GROUP", "KEY", "WAITING", "FOR", "ATTEMPTS", "FIRST MESSAGE", "LAST ERROR")
	for _, one := range keys {
		t.row(one.Consumer, one.Key, one.Waiting, time.Since(one.Since).Round(time.Second), one.Attempts, one.MessageID, short(one.LastError, 60))
	}
	if err := t.Flush(); err != nil || len(keys) < mostKeys {
		return err
	}
	_, err := fmt.Fprintf(out, "\nno more than %d keys are listed, those that have been blocked longest\n", mostKeys)
	return err
}

type consumerPauseCommand struct {
	deskFlags
	noteFlags
	Group string `arg:"" help:"The group."`
}

func (c *consumerPauseCommand) Run(ctx context.Context) error {
	return c.work(ctx, func(desk *app.Admin) error {
		if err := desk.Acts().Pause(ctx, c.Group, c.note()); err != nil {
			return err
		}
		return c.done("group %s is paused: what it has begun it finishes, the rest waits", c.Group)
	})
}

type consumerResumeCommand struct {
	deskFlags
	noteFlags
	Group string `arg:"" help:"The group."`
}

func (c *consumerResumeCommand) Run(ctx context.Context) error {
	return c.work(ctx, func(desk *app.Admin) error {
		if err := desk.Acts().Resume(ctx, c.Group, c.note()); err != nil {
			return err
		}
		return c.done("group %s goes on", c.Group)
	})
}

type consumerSkipCommand struct {
	deskFlags
	noteFlags
	Group string `arg:"" help:"The group."`
	Key   string `arg:"" help:"The key."`
}

func (c *consumerSkipCommand) Run(ctx context.Context) error {
	return c.work(ctx, func(desk *app.Admin) error {
		id, err := desk.Acts().SkipHead(ctx, c.Group, c.Key, c.note())
		if err != nil {
			return err
		}
		return c.done("message %s is a dead letter; those behind it go on", id)
	})
}

type consumerParkCommand struct {
	deskFlags
	noteFlags
	Group string `arg:"" help:"The group."`
	Key   string `arg:"" help:"The key."`
}

func (c *consumerParkCommand) Run(ctx context.Context) error {
	return c.work(ctx, func(desk *app.Admin) error {
		moved, err := desk.Acts().ParkKey(ctx, c.Group, c.Key, c.note())
		if err != nil {
			return err
		}
		return c.done("%s", count(moved, "message is a dead letter", "messages are dead letters")+" now")
	})
}
