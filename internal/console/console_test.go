package console

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/changes"
	"example.com/shop/internal/dev/testenv"
	opsv1 "example.com/shop/internal/gen/ops/v1"
	"example.com/shop/internal/operations"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
	"example.com/shop/internal/session"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// bundle is a console with the rights of shop_operator, and a pool with all rights to prepare things with.
type bundle struct {
	*Console
	owner  *pgxpool.Pool
	broker func() ([]rabbit.Depth, error)
	// dangers are those of policies.
	dangers []rabbit.Danger
}

func setup(t *testing.T) *bundle {
	t.Helper()
	b := &bundle{owner: testenv.Postgres(t)}
	b.broker = func() ([]rabbit.Depth, error) { return []rabbit.Depth{{Queue: "s.group", Ready: 7, Consumers: 1}}, nil }
	db, err := postgres.Open(t.Context(), postgres.Config{URL: testenv.As(t, b.owner.Config().ConnString(),
		"shop_operator"), MaxConns: 8})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	hub := changes.New(changes.Config{})
	b.Console = New(Config{
		DB: db, Operations: operations.New(db, outbox.NewWriter(db, nil, nil), hub, operations.Config{}),
		APIs: []string{"s api"},
		Groups: []Group{{Group: ops.Group{Name: "group", Types: []string{"google.protobuf.StringValue"}},
			Queue: "s.group"}},
		Depths:  func(context.Context, []string) ([]rabbit.Depth, error) { return b.broker() },
		Dangers: func(context.Context) ([]rabbit.Danger, error) { return b.dangers, nil },
	})
	return b
}

func (b *bundle) exec(t *testing.T, sql string, args ...any) {
	t.Helper()
	if _, err := b.owner.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func (b *bundle) text(t *testing.T, sql string) (text string) {
	t.Helper()
	if err := b.owner.QueryRow(t.Context(), sql).Scan(&text); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return text
}

// letters makes n dead letters of many types and keys.
func (b *bundle) letters(t *testing.T, n int) {
	t.Helper()
	b.exec(t, `INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
		SELECT 'group', gen_random_uuid()::text, 'google.protobuf.StringValue', 'k' || n % 1000, '\x0a0161',
			'{"h": "<b>"}', 'permanent', 'broken', 1
		FROM generate_series(1, $1::integer) AS n`, n)
}

func asAnn(t *testing.T) context.Context {
	return auth.As(t.Context(), auth.Caller{Subject: "ann", By: "apikey", Roles: []string{operator}})
}

// heard is a stream that remembers.
type heard struct {
	all []*opsv1.ResolveDeadLettersResponse
}

func (h *heard) Send(m *opsv1.ResolveDeadLettersResponse) error {
	h.all = append(h.all, proto.CloneOf(m))
	return nil
}
func (h *heard) last() *opsv1.ResolveDeadLettersResponse { return h.all[len(h.all)-1] }

func wantCode(t *testing.T, err error, want connect.Code) {
	t.Helper()
	if connect.CodeOf(err) != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// However deep one pages, a page takes the same: it is found by the ID of the one before.
func TestPagingOf100000DeadLetters(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const n = 100_000
	b.letters(t, n)
	b.exec(t, `ANALYZE dead_letter`)
	seen, before := 0, int64(n+1)
	var took []time.Duration
	for token := int64(0); ; {
		began := time.Now()
		page, err := b.ListDeadLetters(t.Context(), &opsv1.ListDeadLettersRequest{PageToken: token, Count: token == 0})
		if err != nil {
			t.Fatal(err)
		}
		if token == 0 && page.GetCount() != n {
			t.Errorf("counted %d", page.GetCount())
		}
		if token != 0 {
			took = append(took, time.Since(began))
		}
		for _, letter := range page.GetLetters() {
			if letter.GetId() >= before {
				t.Fatalf("letter %d comes after %d", letter.GetId(), before)
			}
			before = letter.GetId()
			seen++
		}
		if token = page.GetNextPageToken(); token == 0 {
			break
		}
	}
	slices.Sort(took)
	median, late := took[len(took)/2], took[len(took)*99/100]
	t.Logf("2,000 pages: median %s, 99 of 100 within %s", median, late)
	if seen != n || late > time.Second {
		t.Errorf("saw %d letters, one page of a hundred took %s", seen, late)
	}
	plan := b.text(t, `EXPLAIN (FORMAT JSON) SELECT id FROM dead_letter WHERE id < 50000 AND resolution IS NULL ORDER BY id DESC LIMIT 51`)
	if !strings.Contains(plan, "dead_letter_open_idx") && !strings.Contains(plan, "dead_letter_pkey") ||
		strings.Contains(plan, `"Sort"`) {
		t.Errorf("not by an index: %s", plan)
	}
}

// Resolving by filter tells first how many it is about, changes nothing in a dry run, and keeps who and why.
func TestResolve(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.letters(t, 3)
	b.exec(t, `INSERT INTO inbox (slot, consumer, message_id) SELECT -1, 'group', gen_random_uuid()`)
	resolve := func(resolution opsv1.Resolution, dry bool,
		filter *opsv1.DeadLetterFilter) *opsv1.ResolveDeadLettersResponse {
		t.Helper()
		stream := &heard{}
		err := b.resolve(asAnn(t), &opsv1.ResolveDeadLettersRequest{Filter: filter, Resolution: resolution, DryRun: dry,
			Reason: "why"}, stream.Send)
		if err != nil {
			t.Fatal(err)
		}
		return stream.last()
	}
	const redrive, discard = opsv1.Resolution_RESOLUTION_REDRIVE, opsv1.Resolution_RESOLUTION_DISCARD
	if got := resolve(redrive, true, &opsv1.DeadLetterFilter{}); got.GetTotal() != 3 || got.GetRedriven() != 3 ||
		!got.GetDone() {
		t.Errorf("dry run: %v", got)
	}
	if open := b.text(t, `SELECT count(*)::text FROM dead_letter WHERE resolution IS NULL`); open != "3" {
		t.Errorf("after the dry run %s are open", open)
	}
	if got := resolve(discard, false, &opsv1.DeadLetterFilter{Ids: []int64{1}}); got.GetDiscarded() != 1 {
		t.Errorf("discard: %v", got)
	}
	if _, err := b.ReopenDeadLetter(asAnn(t), &opsv1.ReopenDeadLetterRequest{Id: 1, Reason: "mistake"}); err != nil {
		t.Error(err)
	}
	if got := resolve(redrive, false, &opsv1.DeadLetterFilter{}); got.GetRedriven() != 3 || got.GetUnresolved() != 0 {
		t.Errorf("redrive: %v", got)
	}
	if got := resolve(redrive, false, &opsv1.DeadLetterFilter{Ids: []int64{1}}); got.GetUnresolved() != 1 ||
		got.GetProblem() == "" {
		t.Errorf("redriven twice: %v", got)
	}
	_, err := b.ReopenDeadLetter(asAnn(t), &opsv1.ReopenDeadLetterRequest{Id: 1, Reason: "mistake"})
	wantCode(t, err, connect.CodeFailedPrecondition)
	letter, err := b.GetDeadLetter(t.Context(), &opsv1.GetDeadLetterRequest{Id: 1})
	if err != nil {
		t.Fatal(err)
	}
	audit := ""
	for _, one := range letter.GetAudit() {
		audit += fmt.Sprintf("%s by %s: %s; ", one.GetAction(), one.GetActor(), one.GetReason())
	}
	if audit != "discarded by apikey:ann: why; reopened by apikey:ann: mistake; redriven by apikey:ann: why; " {
		t.Errorf("audit log: %s", audit)
	}
	if p := letter.GetPayload(); !p.GetDecoded() || p.GetText() != `"a"` {
		t.Errorf("payload %v", p)
	}
	_, err = b.GetDeadLetter(t.Context(), &opsv1.GetDeadLetterRequest{Id: 99})
	wantCode(t, err, connect.CodeNotFound)
}

func TestGroupsAndKeys(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(t, `INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
		SELECT 'group', n::text, 't.T', 'k', '', '{}', 1, now(), 'broken' FROM generate_series(1, 3) AS n`)
	ctx := asAnn(t)
	if _, err := b.PauseGroup(ctx, &opsv1.PauseGroupRequest{Group: "group", Reason: "why"}); err != nil {
		t.Fatal(err)
	}
	_, err := b.PauseGroup(ctx, &opsv1.PauseGroupRequest{Group: "group", Reason: "why"})
	wantCode(t, err, connect.CodeFailedPrecondition)
	if got, err := b.BuryKey(ctx, &opsv1.BuryKeyRequest{Group: "group", Key: "k", Reason: "why"}); err != nil ||
		got.GetMoved() != 1 {
		t.Errorf("skip: %v, %v", got, err)
	}
	list, err := b.ListGroups(ctx, &opsv1.ListGroupsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if g := list.GetGroups()[0]; g.GetPausedBy() != "apikey:ann" || g.GetRetrying() != 2 || g.GetBlockedKeys() != 1 {
		t.Errorf("group %v", g)
	}
	if k := list.GetBlockedKeys(); len(k) != 1 || k[0].GetMessageId() != "2" || k[0].GetWaiting() != 2 {
		t.Errorf("blocked keys %v", k)
	}
	if got, err := b.BuryKey(ctx, &opsv1.BuryKeyRequest{Group: "group", Key: "k", Whole: true,
		Reason: "why"}); err != nil || got.GetMoved() != 2 {
		t.Errorf("park: %v, %v", got, err)
	}
	if _, err := b.ResumeGroup(ctx, &opsv1.ResumeGroupRequest{Group: "group", Reason: "why"}); err != nil {
		t.Error(err)
	}
	_, err = b.BuryKey(ctx, &opsv1.BuryKeyRequest{Group: "group", Key: "\x00", Reason: "why"})
	wantCode(t, err, connect.CodeInvalidArgument)
	if list, err = b.ListGroups(ctx, &opsv1.ListGroupsRequest{}); err != nil || len(list.GetAudit()) != 4 {
		t.Errorf("audit log %v, %v", list.GetAudit(), err)
	}
}

func TestMessages(t *testing.T) {
	t.Parallel()
	b := setup(t)
	payload, err := proto.Marshal(wrapperspb.String("<script>"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 120 {
		b.exec(t, `SELECT outbox_insert('google.protobuf.StringValue', $1::text, $2::bytea)`, fmt.Sprint("k", i%2),
			payload)
	}
	b.exec(t, `SELECT outbox_insert('unknown.Type', 'k', '\x00ff'::bytea)`)
	found := map[string]bool{}
	for token := int64(0); ; {
		page, err := b.SearchMessages(t.Context(), &opsv1.SearchMessagesRequest{Key: "k1", PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, one := range page.GetMessages() {
			found[one.GetMessageId()] = true
		}
		if token = page.GetNextPageToken(); token == 0 {
			break
		}
	}
	if len(found) != 60 {
		t.Errorf("found %d", len(found))
	}
	none, err := b.SearchMessages(t.Context(),
		&opsv1.SearchMessagesRequest{Until: timestamppb.New(time.Now().Add(-time.Hour))})
	if err != nil || len(none.GetMessages()) != 0 {
		t.Errorf("an hour ago: %v, %v", none, err)
	}
	newest, err := b.SearchMessages(t.Context(), &opsv1.SearchMessagesRequest{})
	if err != nil || len(newest.GetMessages()) != pageRows || newest.GetMessages()[0].GetType() != "unknown.Type" {
		t.Fatalf("newest: %v, %v", newest, err)
	}
	for i, want := range []string{"00000000  00 ff", `"\u003cscript\u003e"`} {
		one, err := b.GetMessage(t.Context(),
			&opsv1.GetMessageRequest{MessageId: newest.GetMessages()[i].GetMessageId()})
		if err != nil || len(one.GetSteps()) != 2 {
			t.Fatalf("%v, %v", one, err)
		}
		if text := one.GetPayload().GetText(); !strings.HasPrefix(text, want) && text != `"<script>"` {
			t.Errorf("payload %q", text)
		}
	}
	_, err = b.SearchMessages(t.Context(),
		&opsv1.SearchMessagesRequest{Since: &timestamppb.Timestamp{Seconds: 1 << 60}})
	wantCode(t, err, connect.CodeInvalidArgument)
	_, err = b.ListDeadLetters(t.Context(), &opsv1.ListDeadLettersRequest{PageToken: 1 << 62})
	if err != nil {
		t.Errorf("a place behind all: %v", err)
	}
	_, err = b.GetMessage(t.Context(), &opsv1.GetMessageRequest{MessageId: "nobody"})
	wantCode(t, err, connect.CodeNotFound)
}

func TestCancelOfAnybodysOperation(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, state := range []string{"pending", "running"} {
		b.exec(t, `INSERT INTO operation (id, caller, idempotency_key, method, request, request_hash, identity,
			signature, state)
			VALUES (outbox_uuidv7(), 'apikey:bob', '', 'a.B/C', '', '', '', '', $1)`, state)
	}
	list, err := b.ListOperations(t.Context(), &opsv1.ListOperationsRequest{})
	if err != nil || len(list.GetOperations()) != 2 {
		t.Fatalf("%v, %v", list, err)
	}
	for _, one := range list.GetOperations() {
		_, err := b.CancelOperation(asAnn(t), &opsv1.CancelOperationRequest{Id: one.GetId(), Reason: "why"})
		if one.GetState() == "pending" && err != nil || one.GetState() == "running" &&
			connect.CodeOf(err) != connect.CodeFailedPrecondition {
			t.Errorf("%s: %v", one.GetState(), err)
		}
	}
	list, err = b.ListOperations(t.Context(), &opsv1.ListOperationsRequest{State: "cancelled"})
	if err != nil || len(list.GetOperations()) != 1 || !strings.Contains(list.GetOperations()[0].GetError(), "why") {
		t.Errorf("%v, %v", list, err)
	}
	if n := b.text(t, `SELECT count(*)::text FROM operator_audit WHERE action = 'cancel' AND actor = 'apikey:ann'`); n != "1" {
		t.Errorf("%s records", n)
	}
}

// A fault is shown at the station where it is, and nowhere else.
func TestFaultsAreShownWhereTheyAre(t *testing.T) {
	t.Parallel()
	b := setup(t)
	healthy := `
		INSERT INTO outbox_relay (owner, expires_at, lease) VALUES ('r', now() + interval '1 hour', '1 hour');
		UPDATE outbox_cursor SET owner = 'r', lease_expires_at = now() + interval '1 hour', lease = '1 hour';
		INSERT INTO inbox_consumer (consumer, owner, applied, lag, expires_at, lease) VALUES ('group', 'c', 5, 0.01, now() + interval '1 hour', '1 hour')`
	b.exec(t, healthy)
	api, err := session.Connect(t.Context(), b.owner.Config().ConnString())
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close(t.Context())
	if _, err := api.Exec(t.Context(), `SET application_name = 's api'`); err != nil {
		t.Fatal(err)
	}
	faults := func() string {
		var texts []string
		for _, station := range newSampler(b.Console).sample(t.Context()).GetStations() {
			if station.GetState() != fine {
				texts = append(texts, fmt.Sprintf("%s: %s", station.GetName(), station.GetSentence()))
			}
		}
		return strings.Join(texts, "\n")
	}
	if got := faults(); got != "" {
		t.Fatalf("at first:\n%s", got)
	}
	for name, one := range map[string]struct{ do, undo, want string }{
		"NoRelay": {`DELETE FROM outbox_relay`,
			`INSERT INTO outbox_relay (owner, expires_at, lease) VALUES ('r', now() + interval '1 hour', '1 hour')`,
			"relay: No relay is running."},
		"NoLease": {`UPDATE outbox_cursor SET lease_expires_at = now()`,
			`UPDATE outbox_cursor SET lease_expires_at = now() + interval '1 hour', lease = '1 hour'`,
			"relay: No relay holds the lease of shard 0."},
		"RelayBlocked": {`UPDATE outbox_relay SET problem = 'blocked'`, `UPDATE outbox_relay SET problem = ''`,
			"relay: It cannot publish: blocked"},
		"NoConsumer": {`DELETE FROM inbox_consumer`, healthy[strings.LastIndex(healthy, "INSERT"):],
			"group: No process runs this group."},
		"Paused": {`INSERT INTO inbox_pause (consumer, actor, reason) VALUES ('group', 'ann', 'why')`,
			`DELETE FROM inbox_pause`, "group: Paused by ann: why"},
		"BlockedKey": {`INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error) VALUES ('group', 'm', 't', 'k', '', '{}', 1, now(), '')`,
			`DELETE FROM inbox_retry`, "group: 1 key waits for a retry, the longest for "},
	} {
		b.exec(t, one.do)
		if got := faults(); !strings.HasPrefix(got, one.want) || strings.Contains(got, "\n") {
			t.Errorf("%s:\n%s", name, got)
		}
		b.exec(t, one.undo)
	}
	b.dangers = []rabbit.Danger{
		{Queue: "other.dead", Policy: "limits", Setting: "expires=1", Loses: true},
		{Queue: "s.group", Policy: "limits", Setting: "max-length=9"},
		{Queue: "s.group.dead", Policy: "limits", Setting: "message-ttl=60000", Effect: "what waits longer is lost",
			Loses: true},
	}
	if got := faults(); got != "s.group: Messages can be lost: policy limits sets message-ttl=60000 on queue "+
		"s.group.dead: what waits longer is lost." {
		t.Errorf("policy:\n%s", got)
	}
	b.broker = func() ([]rabbit.Depth, error) {
		return nil, errors.New("connect to rabbitmq: dial tcp: connection\nrefused")
	}
	if got := faults(); got != "RabbitMQ: The broker cannot be reached: connection refused.\ns.group: Not known "+
		"while the broker is away." {
		t.Errorf("broker away:\n%s", got)
	}
	b.db.Close()
	if got := faults(); !strings.Contains(got, "outbox: The database cannot be reached: ") {
		t.Errorf("database away:\n%s", got)
	}
}

// 60 minutes of samples take no more room than 15: the ring is full and stays so, and those who watch hold nothing.
func TestTheFlowDoesNotGrow(t *testing.T) {
	t.Parallel()
	f := newFlow()
	for i := range 3600 {
		f.add(&opsv1.WatchFlowResponse{Point: &opsv1.Point{Backlog: int64(i)}})
	}
	history := f.history()
	if len(f.points) != keep || cap(f.points) > 2*keep || len(history) != keep-1 {
		t.Errorf("%d points (room for %d), %d in the history", len(f.points), cap(f.points), len(history))
	}
	for i, point := range history {
		if point.GetBacklog() != int64(3600-keep+i) {
			t.Fatalf("point %d of the history is %d", i, point.GetBacklog())
		}
	}
}

// Rates come of counters that processes take with them when they go.
func TestRatesSurviveARestart(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := newSampler(b.Console)
	at := time.Now()
	var last *velocity
	for i, applied := range []int64{100, 110, 120, 5, 15} {
		owner := "first"
		if i >= 3 {
			owner = "second"
		}
		b.exec(t, `DELETE FROM inbox_consumer`)
		b.exec(t, `INSERT INTO inbox_consumer (consumer, owner, applied, expires_at, lease) VALUES ('group', $1, $2, now() + interval '1 hour', '1 hour')`, owner, applied)
		last = s.measure(at.Add(time.Duration(i)*time.Second), s.read(t.Context()))
	}
	if got := last.applied["group"]; got != 35.0/4 {
		t.Errorf("%g a second", got)
	}
}
