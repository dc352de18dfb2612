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
	"example.com/shop/internal/ops"
)

// noteFlags are the flags of commands that write to the audit log.
type noteFlags struct {
	Reason string `required:"" help:"Reason, for the audit log."`
	Actor  string `help:"Actor, for the audit log. Default: the login name." placeholder:"NAME"`
}

func (f *noteFlags) AfterApply() error {
	f.Actor = actorName(f.Actor)
	return checkNote(f.Actor, f.Reason)
}

func checkNote(actor, reason string) error {
	switch {
	case strings.TrimSpace(reason) == "":
		return errors.New("--reason: must not be empty, since the audit log records it")
	case actor == "":
		return errors.New("--actor: is required, since the audit log records it and no login name is known")
	}
	return nil
}

func (f *noteFlags) note() deadletter.Note { return deadletter.Note{Actor: f.Actor, Reason: f.Reason} }

// done prints what was done.
func (f *adminFlags) done(format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	if f.JSON {
		return printJSON(map[string]string{"done": text})
	}
	_, err := fmt.Println(plain(text))
	return err
}

type consumerLsCommand struct{ adminFlags }

// groupView is a group in the output.
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

// maxKeys bounds how many blocked keys are listed.
const maxKeys = 100

func (c *consumerLsCommand) Run(ctx context.Context) error {
	return c.withAdmin(ctx, func(admin *app.Admin) error {
		statuses, err := inbox.GroupStatuses(ctx, admin.DB, ops.Names(admin.Acts().Groups))
		if err != nil {
			return err
		}
		keys, err := inbox.Blocked(ctx, admin.DB, maxKeys)
		if err != nil {
			return err
		}
		groups := make([]groupView, len(statuses))
		for i, s := range statuses {
			groups[i] = groupView{s.Consumer, len(s.Applied), "", "", s.Retrying, s.Oldest, s.Blocked, s.Lag}
			if s.Paused != nil {
				groups[i].PausedBy, groups[i].Why = s.Paused.Actor, s.Paused.Reason
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
	for _, group := range groups {
		state := "runs"
		switch {
		case group.PausedBy != "":
			state = fmt.Sprintf("paused by %s: %s", group.PausedBy, group.Why)
		case group.Processes == 0:
			state = "no process runs it"
		}
		t.row(group.Group, state, group.Processes, group.Retrying, seconds(group.Oldest), group.Blocked)
	}
	if err := t.Flush(); err != nil || len(keys) == 0 {
		return err
	}
	fmt.Fprintln(out)
	t = newTable(out, "GROUP", "KEY", "WAITING", "FOR", "ATTEMPTS", "FIRST MESSAGE", "LAST ERROR")
	for _, k := range keys {
		blocked := time.Since(k.Since).Round(time.Second)
		t.row(k.Consumer, k.Key, k.Waiting, blocked, k.Attempts, k.MessageID, short(k.LastError, 60))
	}
	if err := t.Flush(); err != nil || len(keys) < maxKeys {
		return err
	}
	_, err := fmt.Fprintf(out, "\nonly the %d keys that have been blocked longest are listed\n", maxKeys)
	return err
}

type consumerPauseCommand struct {
	adminFlags
	noteFlags
	Group string `arg:"" help:"Consumer group."`
}

func (c *consumerPauseCommand) Run(ctx context.Context) error {
	return c.withAdmin(ctx, func(admin *app.Admin) error {
		if err := admin.Acts().Pause(ctx, c.Group, c.note()); err != nil {
			return err
		}
		return c.done("group %s is paused: it finishes the messages that it has begun, and the others wait", c.Group)
	})
}

type consumerResumeCommand struct {
	adminFlags
	noteFlags
	Group string `arg:"" help:"Consumer group."`
}

func (c *consumerResumeCommand) Run(ctx context.Context) error {
	return c.withAdmin(ctx, func(admin *app.Admin) error {
		if err := admin.Acts().Resume(ctx, c.Group, c.note()); err != nil {
			return err
		}
		return c.done("group %s is resumed", c.Group)
	})
}

type consumerSkipCommand struct {
	adminFlags
	noteFlags
	Group string `arg:"" help:"Consumer group."`
	Key   string `arg:"" help:"Key."`
}

func (c *consumerSkipCommand) Run(ctx context.Context) error {
	return c.withAdmin(ctx, func(admin *app.Admin) error {
		id, err := admin.Acts().SkipHead(ctx, c.Group, c.Key, c.note())
		if err != nil {
			return err
		}
		return c.done("message %s is now a dead letter; the messages behind it continue", id)
	})
}

type consumerParkCommand struct {
	adminFlags
	noteFlags
	Group string `arg:"" help:"Consumer group."`
	Key   string `arg:"" help:"Key."`
}

func (c *consumerParkCommand) Run(ctx context.Context) error {
	return c.withAdmin(ctx, func(admin *app.Admin) error {
		moved, err := admin.Acts().ParkKey(ctx, c.Group, c.Key, c.note())
		if err != nil {
			return err
		}
		return c.done("%s", count(moved, "message is a dead letter", "messages are dead letters")+" now")
	})
}
