package inbox

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/messaging"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestOneBadMessageHarmsNoOther(t *testing.T) {
	t.Parallel()
	b := setup(t)
	deliveries, texts := probes(100)
	b.on(texts[41], fails)
	process(t, b.inbox(Config{}), deliveries...)
	b.wantEffects(t, append(append([]string{}, texts[:41]...), texts[42:]...)...)
	b.wantWaiting(t, "m041 1/1")
	b.wantDead(t)
}

// TestHandlerFailures runs each way to fail between two good messages.
func TestHandlerFailures(t *testing.T) {
	t.Parallel()
	db := setup(t).db
	exec(t, db, `
		CREATE TABLE parent (n integer PRIMARY KEY);
		CREATE TABLE child (n integer REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
		CREATE TABLE greedy (n integer);
		CREATE FUNCTION greed() RETURNS trigger LANGUAGE plpgsql AS
			$$ BEGIN RAISE EXCEPTION 'probe' USING ERRCODE = '53200'; END $$;
		CREATE CONSTRAINT TRIGGER greed AFTER INSERT ON greedy DEFERRABLE INITIALLY DEFERRED
			FOR EACH ROW EXECUTE FUNCTION greed()`)
	raise := func(code string) act {
		return func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, `DO $$ BEGIN RAISE EXCEPTION 'probe' USING ERRCODE = '`+code+`'; END $$`)
			return err
		}
	}
	for name, do := range map[string]act{
		"Error": fails,
		"Panic": func(context.Context, pgx.Tx) error { panic("probe") },
		"PanicWithARunningQuery": func(ctx context.Context, tx pgx.Tx) error {
			_, _ = tx.Query(ctx, `SELECT generate_series(1, 100000)`)
			panic(errProbe)
		},
		"SQLError": func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, `SELECT 1 / 0`)
			return err
		},
		"SwallowedSQLError": func(ctx context.Context, tx pgx.Tx) error {
			_, _ = tx.Exec(ctx, `SELECT 1 / 0`)
			return nil
		},
		"RowsLeftOpen": func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Query(ctx, `SELECT generate_series(1, 100000)`)
			return err
		},
		"OwnDeadlineSwallowed": func(ctx context.Context, tx pgx.Tx) error {
			ctx, cancel := context.WithTimeout(ctx, time.Millisecond)
			defer cancel()
			_, _ = tx.Exec(ctx, `SELECT pg_sleep(10)`) // pgx closes the connection
			return nil
		},
		"OwnDeadline": func(ctx context.Context, tx pgx.Tx) error {
			ctx, cancel := context.WithTimeout(ctx, time.Millisecond)
			defer cancel()
			_, err := tx.Exec(ctx, `SELECT pg_sleep(10)`)
			return err
		},
		"TransactionRolledBack": func(ctx context.Context, tx pgx.Tx) error { return tx.Rollback(ctx) },
		"RefusedAtCommit": func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, `INSERT INTO child VALUES (1)`)
			return err
		},
		"TooManyLocks": raise("53200"),
		"TooManyLocksAtCommit": func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, `INSERT INTO greedy VALUES (1)`)
			return err
		},
		// These errors look like a failure of the database, but come from elsewhere.
		"ForeignTableAway":      raise("08001"),
		"ReadOnlyElsewhere":     func(context.Context, pgx.Tx) error { return &pgconn.PgError{Code: "25006"} },
		"EndOfFile":             func(context.Context, pgx.Tx) error { return io.ErrUnexpectedEOF },
		"NetworkErrorElsewhere": func(context.Context, pgx.Tx) error { return &net.OpError{Op: "dial", Err: errProbe} },
		"ContextErrorElsewhere": func(context.Context, pgx.Tx) error { return context.Canceled },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBundle(db, name)
			b.on("bad", do)
			p := b.inbox(eager)
			process(t, p, probe("", "before"), probe("k", "bad"), probe("", "after"))
			b.wantEffects(t, "before", "after")
			b.wantWaiting(t, "bad 1/1")
			if n := retryAll(t, p); n != eager.MaxAttempts-1 {
				t.Errorf("retried %d times, want %d", n, eager.MaxAttempts-1)
			}
			b.wantDead(t, "exhausted 3")
			b.wantWaiting(t)
			b.wantEffects(t, "before", "after")
		})
	}
}

func TestHandlerTimeout(t *testing.T) {
	t.Parallel()
	db := setup(t).db
	const timeout = 2 * time.Second // also long enough for the handlers before and after, which write a row
	for name, do := range map[string]act{
		"InAStatement": func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, `SELECT pg_sleep(60)`)
			return err
		},
		"Elsewhere": func(ctx context.Context, _ pgx.Tx) error { <-ctx.Done(); return ctx.Err() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBundle(db, name)
			b.on("slow", do)
			p := b.inbox(Config{MaxAttempts: 2, RetryBase: 1, HandlerTimeout: timeout})
			process(t, p, probe("", "before"), probe("", "slow"), probe("", "after"))
			b.wantEffects(t, "before", "after")
			b.wantWaiting(t, "slow 1/1")
			retryAll(t, p)
			b.wantDead(t, "exhausted 2")
			if text := b.errorTexts(t)[0]; !strings.HasPrefix(text, "handler ran longer than 2s: ") {
				t.Errorf("error is %q", text)
			}
		})
	}
}

func TestPermanentDiesAtOnce(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.on("first", func(context.Context, pgx.Tx) error { return messaging.Permanent(errProbe) })
	b.on("later", fails)
	p := b.inbox(eager)
	process(t, p, probe("k", "first"), probe("k", "second"), probe("", "later"))
	b.wantDead(t, "permanent 1")
	b.wantEffects(t, "second")
	b.on("later", func(context.Context, pgx.Tx) error {
		return errors.Join(errors.New("x"), messaging.Permanent(errProbe))
	})
	retryAll(t, p)
	b.wantDead(t, "permanent 1", "permanent 2")
	b.wantWaiting(t)
}

// TestUnfitDeliveriesAreKept passes messages as any sender may publish them, between good messages.
func TestUnfitDeliveriesAreKept(t *testing.T) {
	t.Parallel()
	db := setup(t).db
	type delivery = messaging.Delivery
	const flaw = "header message-key is a list"
	tooLong := strings.Repeat("k", messaging.MaxKey+1)
	for name, test := range map[string]struct {
		spoil  func(d *delivery)
		reason deadletter.Reason
	}{
		"Undecodable":           {func(d *delivery) { d.Payload = []byte("\x0a\xff\x00\xfe") }, deadletter.Undecodable},
		"InvalidTextInPayload":  {func(d *delivery) { d.Payload = []byte("\x0a\x02\xff\xfe") }, deadletter.Undecodable},
		"UnknownType":           {func(d *delivery) { d.Type = "google.protobuf.Int32Value" }, deadletter.UnknownType},
		"NoType":                {func(d *delivery) { d.Type = "" }, deadletter.UnknownType},
		"HugeType":              {func(d *delivery) { d.Type = strings.Repeat("t", 1<<20) }, deadletter.UnknownType},
		"NULInID":               {func(d *delivery) { d.ID = "a\x00b" }, deadletter.Malformed},
		"InvalidID":             {func(d *delivery) { d.ID = "a\xff" }, deadletter.Malformed},
		"NULInType":             {func(d *delivery) { d.Type += "\x00" }, deadletter.Malformed},
		"InvalidType":           {func(d *delivery) { d.Type = "\xc3" }, deadletter.Malformed},
		"NULInKey":              {func(d *delivery) { d.Key = "\x00" }, deadletter.Malformed},
		"InvalidKey":            {func(d *delivery) { d.Key = "\xed\xa0\x80" }, deadletter.Malformed},
		"HugeKey":               {func(d *delivery) { d.Key = strings.Repeat("k", 1<<20) }, deadletter.Malformed},
		"KeyOneByteTooLong":     {func(d *delivery) { d.Key = tooLong }, deadletter.Malformed},
		"NULInHeaderName":       {func(d *delivery) { d.Headers["a\x00"] = "1" }, deadletter.Malformed},
		"NULInHeader":           {func(d *delivery) { d.Headers["a"] = "\x00" }, deadletter.Malformed},
		"InvalidHeader":         {func(d *delivery) { d.Headers["a"] = "\xff" }, deadletter.Malformed},
		"InvalidHeaderName":     {func(d *delivery) { d.Headers["\xff"] = "a" }, deadletter.Malformed},
		"KeyIsNotText":          {func(d *delivery) { d.Key, d.Flaw = "", flaw }, deadletter.Malformed},
		"KeyIsNotTextAndNoID":   {func(d *delivery) { d.Key, d.ID, d.Flaw = "", "", flaw }, deadletter.Malformed},
		"NULAndBytesInPayload":  {func(d *delivery) { d.ID, d.Payload = "", []byte("\x00\xff\x00") }, deadletter.NoID},
		"NoPayloadAndNoHeaders": {func(d *delivery) { d.ID, d.Payload, d.Headers = "", nil, nil }, deadletter.NoID},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBundle(db, name)
			unfit := probe("k", "unfit")
			test.spoil(&unfit)
			process(t, b.inbox(Config{}), probe("k", "before"), unfit, probe("k", "after"))
			b.wantEffects(t, "before", "after")
			b.wantKept(t, test.reason, unfit.Payload)
			b.wantWaiting(t)
		})
	}
}

// The dead letter of an undecodable message states how the sender labelled the payload, and keeps the label.
func TestLettersNameTheEncodingOfTheSender(t *testing.T) {
	t.Parallel()
	b := setup(t)
	zipped := probe("k", "unfit")
	zipped.Payload = []byte("\x1f\x8b\x08\x00")
	zipped.Headers = map[string]string{
		messaging.ContentTypeHeader: "application/json", messaging.ContentEncodingHeader: "gzip",
	}
	process(t, b.inbox(Config{}), zipped)
	b.wantDead(t, string(deadletter.Undecodable)+" 1")
	var text string
	var headers map[string]string
	const sql = `SELECT error, headers FROM dead_letter WHERE consumer = $1`
	if err := b.db.QueryRow(t.Context(), sql, b.group.Name()).Scan(&text, &headers); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(text, `sent with content-type "application/json", sent with content-encoding "gzip"`) {
		t.Errorf("the dead letter has error %q", text)
	}
	if headers[messaging.ContentTypeHeader] != "application/json" ||
		headers[messaging.ContentEncodingHeader] != "gzip" {
		t.Errorf("the dead letter has headers %v", headers)
	}
}

// TestBareDeliveryIsTaken omits everything that is optional, including the payload: an empty message has no bytes.
func TestBareDeliveryIsTaken(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.on("", fails)
	name := (*wrapperspb.StringValue)(nil).ProtoReflect().Descriptor().FullName()
	bare := messaging.Delivery{ID: probe("", "").ID, Type: string(name)}
	p := b.inbox(eager)
	process(t, p, bare)
	b.wantWaiting(t, " 1/1")
	b.on("", nil)
	retryAll(t, p)
	b.wantEffects(t, "")
}

func TestErrorTextsOfEveryKindAreKept(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for name, text := range map[string]string{
		"nul": "a\x00b", "invalid": "a\xffb", "long": strings.Repeat("ü", 1<<20), "empty": "",
	} {
		b.on(name, func(context.Context, pgx.Tx) error { return errors.New(text) })
	}
	p := b.inbox(eager)
	process(t, p, probe("", "nul"), probe("", "invalid"), probe("", "long"), probe("", "empty"))
	b.wantWaiting(t, "nul 1/1", "invalid 1/1", "long 1/1", "empty 1/1")
	retryAll(t, p)
	b.wantDead(t, "exhausted 3", "exhausted 3", "exhausted 3", "exhausted 3")
	for _, text := range b.errorTexts(t) {
		if len(text) > 4<<10 || !messaging.ValidText(text) {
			t.Errorf("kept %d bytes: %.100q", len(text), text)
		}
	}
}
