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
	deskFlags
	MessageID string `arg:"" help:"The message's ID."`
}

func (c *traceCommand) Validate() error {
	if c.MessageID == "" {
		return errors.New("<message-id>: is empty")
	}
	return nil
}

// entryView is a message as it stands in the outbox.
type entryView struct {
	Type          string    `json:"type"`
	Key           string    `json:"key"`
	TransactionID uint64    `json:"transaction_id"`
	Shard         int16     `json:"shard"`
	InsertedAt    time.Time `json:"inserted_at"`
	Published     bool      `json:"published"` // or parked, which a dead letter of the relay tells
}

func (c *traceCommand) Run(ctx context.Context) error {
	return c.work(ctx, func(desk *app.Admin) error {
		journey, err := ops.Trace(ctx, desk.DB, c.MessageID)
		if err != nil {
			return err
		}
		if !journey.Known() {
			return fmt.Errorf("message %s is not known: neither outbox nor inbox nor dead letters hold it, or not any more", plain(c.MessageID))
		}
		steps := journey.Steps(desk.Groups())
		if c.JSON {
			return c.printJSON(journey, steps)
		}
		return c.print(os.Stdout, journey, steps)
	})
}

func (c *traceCommand) printJSON(journey ops.MessageTrace, steps []ops.Step) error {
	entries, letters := []entryView{}, []letterView{}
	for _, one := range journey.Log {
		entries = append(entries, entryView{one.Type, one.Key, one.TransactionID, one.Shard, one.CreatedAt, one.Delivered})
	}
	for _, one := range journey.Letters {
		view := viewOf(one)
		view.Audit = journey.Audit[one.ID]
		letters = append(letters, view)
	}
	return printJSON(map[string]any{"message_id": c.MessageID, "outbox": entries, "groups": journey.Groups, "dead_letters": letters, "steps": steps})
}

func (c *traceCommand) print(out io.Writer, journey ops.MessageTrace, steps []ops.Step) error {
	fmt.Fprintln(out, "message", plain(c.MessageID))
	if len(journey.Log) > 0 {
		fmt.Fprintf(out, "type %s, key %s\n", cellText(journey.Log[0].Type), cellText(journey.Log[0].Key))
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
