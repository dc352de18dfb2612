package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"example.com/shop/internal/app"
	"example.com/shop/internal/ops"
)

type traceCommand struct {
	adminFlags
	MessageID string `arg:"" help:"Message ID, also of a scheduled message."`
}

func (c *traceCommand) Validate() error {
	if c.MessageID == "" {
		return errors.New("<message-id>: must not be empty")
	}
	return nil
}

// entryView is a message of the outbox in the output.
type entryView struct {
	Type          string    `json:"type"`
	Key           string    `json:"key"`
	TransactionID uint64    `json:"transaction_id"`
	Shard         int16     `json:"shard"`
	InsertedAt    time.Time `json:"inserted_at"`
	Published     bool      `json:"published"` // or parked, if the relay has a dead letter
}

func (c *traceCommand) Run(ctx context.Context) error {
	return c.withAdmin(ctx, func(admin *app.Admin) error {
		trace, err := ops.Trace(ctx, admin.DB, c.MessageID)
		if err != nil {
			return err
		}
		if !trace.Known() {
			return fmt.Errorf("message %s is unknown: outbox, inbox and dead letters do not contain it, or no longer do",
				plain(c.MessageID))
		}
		steps := trace.Steps(admin.Groups())
		if c.JSON {
			return c.printJSON(trace, steps)
		}
		return c.print(os.Stdout, trace, steps)
	})
}

func (c *traceCommand) printJSON(trace ops.MessageTrace, steps []ops.Step) error {
	entries, letters := []entryView{}, []letterView{}
	for _, e := range trace.Log {
		entries = append(entries, entryView{e.Type, e.Key, e.TransactionID, e.Shard, e.CreatedAt, e.Delivered})
	}
	for _, letter := range trace.Letters {
		view := viewOf(letter)
		view.Audit = trace.Audit[letter.ID]
		letters = append(letters, view)
	}
	answer := map[string]any{
		"message_id": trace.MessageID, "outbox": entries, "groups": trace.Groups, "dead_letters": letters, "steps": steps,
	}
	if trace.ScheduledID != "" {
		answer["scheduled_id"] = trace.ScheduledID
	}
	if trace.Scheduled != nil {
		answer["due_at"] = trace.Scheduled.DueAt
	}
	return printJSON(answer)
}

func (c *traceCommand) print(out io.Writer, trace ops.MessageTrace, steps []ops.Step) error {
	fmt.Fprintln(out, "message", plain(trace.MessageID))
	switch {
	case trace.Scheduled != nil:
		fmt.Fprintf(out, "type %s, key %s\n", cellText(trace.Scheduled.Type), cellText(trace.Scheduled.Key))
	case len(trace.Log) > 0:
		fmt.Fprintf(out, "type %s, key %s\n", cellText(trace.Log[0].Type), cellText(trace.Log[0].Key))
	}
	fmt.Fprintln(out)
	t := newTable(out, "TIME", "WHERE", "WHAT")
	for _, step := range steps {
		when := "-"
		if step.At != nil {
			when = step.At.UTC().Format("2006-01-02 15:04:05.000Z")
		}
		t.row(when, step.Where, step.What)
	}
	return t.Flush()
}
