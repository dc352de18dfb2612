package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"example.com/shop/internal/app"
	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/ops"
)

type deadCommand struct {
	List    deadListCommand    `cmd:"" help:"List dead letters."`
	Show    deadShowCommand    `cmd:"" help:"Show one, with its payload and what was done about it."`
	Redrive deadRedriveCommand `cmd:"" help:"Send their messages on their way again."`
	Discard deadDiscardCommand `cmd:"" help:"Give them up."`
	Reopen  deadReopenCommand  `cmd:"" help:"Take back that one was discarded."`
}

// letterFilter chooses dead letters.
type letterFilter struct {
	ID        []int64 `help:"The letter with this ID; may be repeated." placeholder:"ID"`
	Group     string  `help:"Letters of this consumer group, or of the relay." placeholder:"GROUP|relay"`
	MessageID string  `help:"Letters of this message." placeholder:"ID"`
	Type      string  `help:"Letters of this message type." placeholder:"TYPE"`
	Key       string  `help:"Letters of this key." placeholder:"KEY"`
	Cause     string  `help:"Letters that died of this: ${causes}." placeholder:"CAUSE"`
	period
}

// causes are what a letter may have died of.
func causes() string {
	var texts []string
	for _, reason := range deadletter.Reasons {
		texts = append(texts, string(reason))
	}
	return strings.Join(texts, ", ")
}

func (f *letterFilter) check() error {
	if f.Cause != "" && !slices.Contains(deadletter.Reasons, deadletter.Reason(f.Cause)) {
		return fmt.Errorf("--cause: %q is none of %s", f.Cause, causes())
	}
	return f.period.check()
}

func (f *letterFilter) isEmpty() bool {
	return len(f.ID) == 0 && f.Group+f.MessageID+f.Type+f.Key+f.Cause == "" && f.Since.IsZero() && f.Until.IsZero()
}

func (f *letterFilter) filter() deadletter.Filter {
	return deadletter.Filter{
		IDs: f.ID, Consumer: f.Group, MessageID: f.MessageID, Type: f.Type, Key: f.Key, Reason: deadletter.Reason(f.Cause),
		Since: f.Since.Time, Until: f.Until.Time,
	}
}

// letterView is a letter as it is printed. Only show fills Payload.
type letterView struct {
	ID         int64                 `json:"id"`
	Group      string                `json:"group"`
	MessageID  string                `json:"message_id"`
	Type       string                `json:"type"`
	Key        string                `json:"key"`
	Cause      deadletter.Reason     `json:"cause"`
	Error      string                `json:"error"`
	Attempts   int                   `json:"attempts"`
	DiedAt     time.Time             `json:"died_at"`
	Resolution deadletter.Resolution `json:"resolution,omitempty"`
	ResolvedAt *time.Time            `json:"resolved_at,omitempty"`
	Headers    map[string]string     `json:"headers,omitempty"`
	Payload    []byte                `json:"payload,omitempty"`
	Audit      []deadletter.Record   `json:"audit,omitempty"`
}

func viewOf(l deadletter.Stored) letterView {
	return letterView{
		ID: l.ID, Group: cmp.Or(l.Consumer, deadletter.Relay), MessageID: l.MessageID, Type: l.Type, Key: l.Key, Cause: l.Reason, Error: l.Error,
		Attempts: l.Attempts, DiedAt: l.DeadAt, Resolution: l.Resolution, ResolvedAt: l.ResolvedAt,
	}
}

type deadListCommand struct {
	deskFlags
	letterFilter
	Resolved bool  `help:"Resolved letters, too."`
	Limit    int   `default:"50" help:"Most letters to list, 1 to 1000."`
	After    int64 `help:"Letters after this ID: the next page." placeholder:"ID"`
}

func (c *deadListCommand) Validate() error {
	if err := between("--limit", c.Limit, 1, 1000); err != nil {
		return err
	}
	return c.letterFilter.check()
}

func (c *deadListCommand) Run(ctx context.Context) error {
	return c.work(ctx, func(desk *app.Admin) error {
		filter := c.filter()
		filter.Resolved = c.Resolved
		letters, err := deadletter.List(ctx, desk.DB, filter, c.After, c.Limit+1) // one more, to know whether there are more
		if err != nil {
			return err
		}
		next := int64(0)
		if len(letters) > c.Limit {
			letters = letters[:c.Limit]
			next = letters[c.Limit-1].ID
		}
		views := make([]letterView, len(letters))
		for i, letter := range letters {
			views[i] = viewOf(letter)
		}
		if c.JSON {
			return printJSON(struct {
				Letters []letterView `json:"letters"`
				Next    int64        `json:"next_after,omitempty"`
			}{views, next})
		}
		return printLetters(os.Stdout, views, next)
	})
}

func printLetters(out io.Writer, letters []letterView, next int64) error {
	if len(letters) == 0 {
		_, err := fmt.Fprintln(out, "no dead letters")
		return err
	}
	t := newTable(out, "ID", "DIED", "GROUP", "CAUSE", "ATTEMPTS", "MESSAGE", "TYPE", "KEY", "STATE", "ERROR")
	for _, one := range letters {
		t.row(one.ID, one.DiedAt, one.Group, one.Cause, one.Attempts, one.MessageID, one.Type, one.Key, cmp.Or(one.Resolution, "open"), short(one.Error, 60))
	}
	if err := t.Flush(); err != nil || next == 0 {
		return err
	}
	_, err := fmt.Fprintf(out, "\nthere are more: --after=%d\n", next)
	return err
}

type deadShowCommand struct {
	deskFlags
	ID   int64 `arg:"" help:"The letter's ID."`
	Full bool  `help:"The whole payload, and not only its beginning."`
}

func (c *deadShowCommand) Run(ctx context.Context) error {
	return c.work(ctx, func(desk *app.Admin) error {
		letter, found, err := deadletter.Get(ctx, desk.DB, c.ID)
		if err != nil {
			return err
		}
		if !found {
			return fmt.Errorf("there is no dead letter %d", c.ID)
		}
		view := viewOf(letter)
		view.Headers, view.Payload = letter.Headers, letter.Payload
		if view.Audit, err = deadletter.Audit(ctx, desk.DB, c.ID); err != nil {
			return err
		}
		if c.JSON {
			return printJSON(view)
		}
		return c.print(os.Stdout, view)
	})
}

// previewBytes is a screenful of payload.
const previewBytes = 256

func (c *deadShowCommand) print(out io.Writer, v letterView) error {
	t := newTable(out, "dead letter", v.ID)
	t.row("state", cmp.Or(v.Resolution, "open"))
	t.row("group", v.Group)
	t.row("cause", v.Cause)
	t.row("error", v.Error)
	t.row("attempts", v.Attempts)
	t.row("died", v.DiedAt)
	t.row("message", v.MessageID)
	t.row("type", v.Type)
	t.row("key", v.Key)
	for _, name := range slices.Sorted(maps.Keys(v.Headers)) {
		t.row("header "+name, v.Headers[name])
	}
	for _, record := range v.Audit {
		t.row(record.Resolution, fmt.Sprintf("%s by %s: %s %s", cellText(record.At), record.Actor, record.Reason, record.Detail))
	}
	t.row("payload", count(len(v.Payload), "byte", "bytes"))
	if err := t.Flush(); err != nil {
		return err
	}
	shown := v.Payload
	if !c.Full {
		shown = shown[:min(len(shown), previewBytes)]
	}
	_, err := io.WriteString(out, hex.Dump(shown))
	if err == nil && len(shown) < len(v.Payload) {
		_, err = fmt.Fprintf(out, "and %s more: --full\n", count(len(v.Payload)-len(shown), "byte", "bytes"))
	}
	return err
}

// resolveFlags are those of redrive and discard.
type resolveFlags struct {
	letterFilter
	All    bool    `help:"All open letters. Needed when no filter is given."`
	Reason string  `required:"" help:"Why, for the audit log."`
	Actor  string  `help:"Who, for the audit log. Default: the name logged in with." placeholder:"NAME"`
	Rate   float64 `default:"100" help:"Most letters a second, 0.01 to 100000."`
	DryRun bool    `help:"Say what would be done, and change nothing."`
}

func (f *resolveFlags) check() error { return f.checkAs(person(f.Actor)) }

func (f *resolveFlags) checkAs(actor string) error {
	f.Actor = actor
	switch {
	case strings.TrimSpace(f.Reason) == "":
		return errors.New("--reason: is empty; it is kept in the audit log")
	case f.Actor == "":
		return errors.New("--actor: is not given, and nobody is logged in; it is kept in the audit log")
	case f.isEmpty() && !f.All:
		return errors.New("--all: is needed to resolve every open letter; else choose some by --id or another filter")
	case !f.isEmpty() && f.All:
		return errors.New("--all: contradicts a filter")
	}
	if err := between("--rate", f.Rate, 0.01, 1e5); err != nil {
		return err
	}
	return f.letterFilter.check()
}

func (f *resolveFlags) order(desk *app.Admin, tell *teller) ops.Selection {
	return ops.Selection{
		Filter: f.filter(), Note: deadletter.Note{Actor: f.Actor, Reason: f.Reason},
		PerSecond: f.Rate, DryRun: f.DryRun, Groups: desk.Acts().Groups,
		Begin: func(total int64) { tell.left = int(total) },
	}
}

type deadRedriveCommand struct {
	deskFlags
	resolveFlags
	Force bool `help:"Also what may have had its effect already, because its copies cannot be told from it any more."`
}

func (c *deadRedriveCommand) Validate() error { return c.resolveFlags.check() }

func (c *deadRedriveCommand) Run(ctx context.Context) error {
	return c.work(ctx, func(desk *app.Admin) error {
		tell := newTeller(c.JSON, c.DryRun)
		order := c.order(desk, tell)
		order.Force = c.Force
		return tell.summary(ops.Redrive(ctx, desk.DB, order, tell.letter), deadletter.Redriven, deadletter.Duplicate)
	})
}

type deadDiscardCommand struct {
	deskFlags
	resolveFlags
}

func (c *deadDiscardCommand) Validate() error { return c.resolveFlags.check() }

func (c *deadDiscardCommand) Run(ctx context.Context) error {
	return c.work(ctx, func(desk *app.Admin) error {
		tell := newTeller(c.JSON, c.DryRun)
		return tell.summary(ops.Discard(ctx, desk.DB, c.order(desk, tell), tell.letter), deadletter.Discarded)
	})
}

type deadReopenCommand struct {
	deskFlags
	noteFlags
	ID int64 `arg:"" help:"The letter's ID."`
}

func (c *deadReopenCommand) Run(ctx context.Context) error {
	return c.work(ctx, func(desk *app.Admin) error {
		if err := ops.Reopen(ctx, desk.DB, c.ID, c.note()); err != nil {
			return err
		}
		return c.done("dead letter %d is open again", c.ID)
	})
}

// teller prints what became of letters, one line each, and counts.
type teller struct {
	json, dryRun bool
	counts       map[deadletter.Resolution]int
	unresolved   int
	left         int // of those that were there at the beginning; others may resolve some, too
}

func newTeller(json, dryRun bool) *teller {
	return &teller{json: json, dryRun: dryRun, counts: map[deadletter.Resolution]int{}}
}

func (t *teller) letter(o ops.Outcome) {
	t.left--
	if o.Err != nil {
		t.unresolved++
	} else {
		t.counts[o.Resolution]++
	}
	if t.json {
		view := struct {
			letterView
			Resolution deadletter.Resolution `json:"resolution,omitempty"`
			Detail     string                `json:"detail,omitempty"`
			Unresolved string                `json:"unresolved,omitempty"` // why
		}{letterView: viewOf(o.Letter), Resolution: o.Resolution, Detail: o.Detail}
		if o.Err != nil {
			view.Unresolved = o.Err.Error()
		}
		_ = printJSON(view) // the next one fails too, and so does the summary
		return
	}
	what := string(o.Resolution)
	switch {
	case o.Err != nil:
		what = "not resolved: " + o.Err.Error()
	case t.dryRun:
		what = "would be " + what
	}
	if o.Detail != "" {
		what += ", " + o.Detail
	}
	of := ""
	if l := o.Letter; l.Reason != "" {
		of = fmt.Sprintf(" of %s, %s, message %s, key %q", cmp.Or(l.Consumer, deadletter.Relay), l.Reason, cmp.Or(l.MessageID, "without ID"), l.Key)
	}
	fmt.Println(plain(fmt.Sprintf("letter %d%s: %s", o.Letter.ID, of, what)))
}

// summary prints the counts, and returns an error if not all was done.
func (t *teller) summary(err error, kinds ...deadletter.Resolution) error {
	left := 0
	if err != nil {
		left = max(0, t.left)
	}
	if failed := t.print(left, kinds); failed != nil && err == nil {
		err = failed
	}
	switch {
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("broken off with %s to go; what is resolved stays so, and the same command goes on with the rest",
			count(left, "letter", "letters"))
	case err == nil && t.unresolved > 0:
		return fmt.Errorf("%s not resolved", count(t.unresolved, "letter was", "letters were"))
	}
	return err
}

func (t *teller) print(left int, kinds []deadletter.Resolution) error {
	if t.json {
		counts := map[string]any{"dry_run": t.dryRun, "unresolved": t.unresolved, "left": left}
		for _, kind := range kinds {
			counts[string(kind)] = t.counts[kind]
		}
		return printJSON(map[string]any{"summary": counts})
	}
	parts := []string{}
	for _, kind := range kinds {
		parts = append(parts, fmt.Sprintf("%d %s", t.counts[kind], kind))
	}
	parts = append(parts, fmt.Sprintf("%d not resolved", t.unresolved))
	if left > 0 {
		parts = append(parts, fmt.Sprintf("%d left", left))
	}
	text := strings.Join(parts, ", ")
	if t.dryRun {
		text += " (dry run: nothing was changed)"
	}
	_, err := fmt.Println(text)
	return err
}
