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
	Show    deadShowCommand    `cmd:"" help:"Show a dead letter with its payload and audit log."`
	Redrive deadRedriveCommand `cmd:"" help:"Send dead letters again."`
	Discard deadDiscardCommand `cmd:"" help:"Discard dead letters."`
	Reopen  deadReopenCommand  `cmd:"" help:"Reopen a discarded dead letter."`
}

// letterFilter selects dead letters.
type letterFilter struct {
	ID        []int64 `help:"Only the dead letter with this ID; may be repeated." placeholder:"ID"`
	Group     string  `help:"Only dead letters of this consumer group, or of the relay." placeholder:"GROUP|relay"`
	MessageID string  `help:"Only dead letters of this message." placeholder:"ID"`
	Type      string  `help:"Only dead letters of this message type." placeholder:"TYPE"`
	Key       string  `help:"Only dead letters of this key." placeholder:"KEY"`
	Cause     string  `help:"Only dead letters with this cause: ${causes}." placeholder:"CAUSE"`
	period
}

// causes lists the causes of dead letters.
func causes() string {
	var texts []string
	for _, reason := range deadletter.Reasons {
		texts = append(texts, string(reason))
	}
	return strings.Join(texts, ", ")
}

func (f *letterFilter) check() error {
	if f.Cause != "" && !slices.Contains(deadletter.Reasons, deadletter.Reason(f.Cause)) {
		return fmt.Errorf("--cause: %q is not one of %s", f.Cause, causes())
	}
	return f.period.check()
}

func (f *letterFilter) isEmpty() bool {
	return len(f.ID) == 0 && f.Group+f.MessageID+f.Type+f.Key+f.Cause == "" && f.Since.IsZero() && f.Until.IsZero()
}

func (f *letterFilter) filter() deadletter.Filter {
	return deadletter.Filter{
		IDs: f.ID, Consumer: f.Group, MessageID: f.MessageID, Type: f.Type, Key: f.Key,
		Reason: deadletter.Reason(f.Cause), Since: f.Since.Time, Until: f.Until.Time,
	}
}

// letterView is a dead letter in the output. Only show sets Payload.
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
		ID: l.ID, Group: cmp.Or(l.Consumer, deadletter.Relay), MessageID: l.MessageID, Type: l.Type, Key: l.Key,
		Cause: l.Reason, Error: l.Error, Attempts: l.Attempts, DiedAt: l.DeadAt,
		Resolution: l.Resolution, ResolvedAt: l.ResolvedAt,
	}
}

type deadListCommand struct {
	adminFlags
	letterFilter
	Resolved bool  `help:"Include resolved dead letters."`
	Limit    int   `default:"50" help:"Maximum dead letters to list, 1 to 1000."`
	After    int64 `help:"Only dead letters after this ID: the next page." placeholder:"ID"`
}

func (c *deadListCommand) Validate() error {
	if err := between("--limit", c.Limit, 1, 1000); err != nil {
		return err
	}
	return c.letterFilter.check()
}

func (c *deadListCommand) Run(ctx context.Context) error {
	return c.withAdmin(ctx, func(admin *app.Admin) error {
		filter := c.filter()
		filter.Resolved = c.Resolved
		// One more tells if there is a next page.
		letters, err := deadletter.List(ctx, admin.DB, filter, c.After, c.Limit+1)
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
	for _, l := range letters {
		state := cmp.Or(l.Resolution, "open")
		t.row(l.ID, l.DiedAt, l.Group, l.Cause, l.Attempts, l.MessageID, l.Type, l.Key, state, short(l.Error, 60))
	}
	if err := t.Flush(); err != nil || next == 0 {
		return err
	}
	_, err := fmt.Fprintf(out, "\nthere are more: --after=%d\n", next)
	return err
}

type deadShowCommand struct {
	adminFlags
	ID   int64 `arg:"" help:"ID of the dead letter."`
	Full bool  `help:"Print the whole payload, not only its beginning."`
}

func (c *deadShowCommand) Run(ctx context.Context) error {
	return c.withAdmin(ctx, func(admin *app.Admin) error {
		letter, found, err := deadletter.Get(ctx, admin.DB, c.ID)
		if err != nil {
			return err
		}
		if !found {
			return fmt.Errorf("there is no dead letter %d", c.ID)
		}
		view := viewOf(letter)
		view.Headers, view.Payload = letter.Headers, letter.Payload
		if view.Audit, err = deadletter.Audit(ctx, admin.DB, c.ID); err != nil {
			return err
		}
		if c.JSON {
			return printJSON(view)
		}
		return c.print(os.Stdout, view)
	})
}

// previewBytes is how much of a payload fits on a screen.
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
		text := fmt.Sprintf("%s by %s: %s %s", cellText(record.At), record.Actor, record.Reason, record.Detail)
		t.row(record.Resolution, text)
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

// resolveFlags are the flags of redrive and discard.
type resolveFlags struct {
	letterFilter
	All    bool    `help:"All open dead letters. Required without a filter."`
	Reason string  `required:"" help:"Reason, for the audit log."`
	Actor  string  `help:"Actor, for the audit log. Default: the login name." placeholder:"NAME"`
	Rate   float64 `default:"100" help:"Maximum dead letters per second, 0.01 to 100000."`
	DryRun bool    `help:"Print what would be done, and change nothing."`
}

func (f *resolveFlags) check() error { return f.checkAs(actorName(f.Actor)) }

func (f *resolveFlags) checkAs(actor string) error {
	f.Actor = actor
	if err := checkNote(f.Actor, f.Reason); err != nil {
		return err
	}
	switch {
	case f.isEmpty() && !f.All:
		return errors.New("--all: is required to resolve every open dead letter; " +
			"select some with --id or another filter")
	case !f.isEmpty() && f.All:
		return errors.New("--all: cannot be combined with a filter")
	}
	if err := between("--rate", f.Rate, 0.01, 1e5); err != nil {
		return err
	}
	return f.letterFilter.check()
}

func (f *resolveFlags) selection(admin *app.Admin, printer *outcomePrinter) ops.Selection {
	return ops.Selection{
		Filter: f.filter(), Note: deadletter.Note{Actor: f.Actor, Reason: f.Reason},
		PerSecond: f.Rate, DryRun: f.DryRun, Groups: admin.Acts().Groups,
		Begin: func(total int64) { printer.left = int(total) },
	}
}

type deadRedriveCommand struct {
	adminFlags
	resolveFlags
	Force bool `help:"${force}"`
}

func (c *deadRedriveCommand) Validate() error { return c.resolveFlags.check() }

func (c *deadRedriveCommand) Run(ctx context.Context) error {
	return c.withAdmin(ctx, func(admin *app.Admin) error {
		printer := newOutcomePrinter(c.JSON, c.DryRun)
		selection := c.selection(admin, printer)
		selection.Force = c.Force
		err := ops.Redrive(ctx, admin.DB, selection, printer.letter)
		return printer.summary(err, deadletter.Redriven, deadletter.Duplicate)
	})
}

type deadDiscardCommand struct {
	adminFlags
	resolveFlags
}

func (c *deadDiscardCommand) Validate() error { return c.resolveFlags.check() }

func (c *deadDiscardCommand) Run(ctx context.Context) error {
	return c.withAdmin(ctx, func(admin *app.Admin) error {
		printer := newOutcomePrinter(c.JSON, c.DryRun)
		err := ops.Discard(ctx, admin.DB, c.selection(admin, printer), printer.letter)
		return printer.summary(err, deadletter.Discarded)
	})
}

type deadReopenCommand struct {
	adminFlags
	noteFlags
	ID int64 `arg:"" help:"ID of the dead letter."`
}

func (c *deadReopenCommand) Run(ctx context.Context) error {
	return c.withAdmin(ctx, func(admin *app.Admin) error {
		if err := ops.Reopen(ctx, admin.DB, c.ID, c.note()); err != nil {
			return err
		}
		return c.done("dead letter %d is open again", c.ID)
	})
}

// outcomePrinter prints the outcome of each dead letter on a line, and counts outcomes.
type outcomePrinter struct {
	json, dryRun bool
	counts       map[deadletter.Resolution]int
	unresolved   int
	left         int // of the dead letters that were open at the beginning; other operators may resolve some of them
}

func newOutcomePrinter(json, dryRun bool) *outcomePrinter {
	return &outcomePrinter{json: json, dryRun: dryRun, counts: map[deadletter.Resolution]int{}}
}

func (p *outcomePrinter) letter(o ops.Outcome) {
	p.left--
	if o.Err != nil {
		p.unresolved++
	} else {
		p.counts[o.Resolution]++
	}
	if p.json {
		view := struct {
			letterView
			Resolution deadletter.Resolution `json:"resolution,omitempty"`
			Detail     string                `json:"detail,omitempty"`
			Unresolved string                `json:"unresolved,omitempty"` // why
		}{letterView: viewOf(o.Letter), Resolution: o.Resolution, Detail: o.Detail}
		if o.Err != nil {
			view.Unresolved = o.Err.Error()
		}
		_ = printJSON(view) // the summary fails with the same error
		return
	}
	what := string(o.Resolution)
	switch {
	case o.Err != nil:
		what = "not resolved: " + o.Err.Error()
	case p.dryRun:
		what = "would be " + what
	}
	if o.Detail != "" {
		what += ", " + o.Detail
	}
	of := ""
	if l := o.Letter; l.Reason != "" {
		group, message := cmp.Or(l.Consumer, deadletter.Relay), cmp.Or(l.MessageID, "without ID")
		of = fmt.Sprintf(" of %s, %s, message %s, key %q", group, l.Reason, message, l.Key)
	}
	fmt.Println(plain(fmt.Sprintf("dead letter %d%s: %s", o.Letter.ID, of, what)))
}

// summary prints the counts, and returns an error unless every dead letter was resolved.
func (p *outcomePrinter) summary(err error, kinds ...deadletter.Resolution) error {
	left := 0
	if err != nil {
		left = max(0, p.left)
	}
	if failed := p.print(left, kinds); failed != nil && err == nil {
		err = failed
	}
	switch {
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("interrupted with %s left; the same command continues with them",
			count(left, "dead letter", "dead letters"))
	case err == nil && p.unresolved > 0:
		return fmt.Errorf("%s not resolved", count(p.unresolved, "dead letter was", "dead letters were"))
	}
	return err
}

func (p *outcomePrinter) print(left int, kinds []deadletter.Resolution) error {
	if p.json {
		counts := map[string]any{"dry_run": p.dryRun, "unresolved": p.unresolved, "left": left}
		for _, kind := range kinds {
			counts[string(kind)] = p.counts[kind]
		}
		return printJSON(map[string]any{"summary": counts})
	}
	parts := []string{}
	for _, kind := range kinds {
		parts = append(parts, fmt.Sprintf("%d %s", p.counts[kind], kind))
	}
	parts = append(parts, fmt.Sprintf("%d not resolved", p.unresolved))
	if left > 0 {
		parts = append(parts, fmt.Sprintf("%d left", left))
	}
	text := strings.Join(parts, ", ")
	if p.dryRun {
		text += " (dry run: nothing was changed)"
	}
	_, err := fmt.Println(text)
	return err
}
