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
	"example.com/shop/internal/dev/testenv"
	opsv1 "example.com/shop/internal/gen/ops/v1"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
	"example.com/shop/internal/session"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// fixture is a console with the role shop_operator, and a pool of the owner to prepare data.
type fixture struct {
	*Console
	owner   *pgxpool.Pool
	broker  func() ([]rabbit.Depth, error)
	dangers []rabbit.Danger
}

func setup(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{owner: testenv.Postgres(t)}
	f.broker = func() ([]rabbit.Depth, error) {
		return []rabbit.Depth{{Queue: "s.group", Ready: 7, Consumers: 1}}, nil
	}
	url := testenv.As(t, f.owner.Config().ConnString(), "shop_operator")
	db, err := postgres.Open(t.Context(), postgres.Config{URL: url, MaxConns: 8})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	group := ops.Group{Name: "group", Types: []string{"google.protobuf.StringValue"}}
	f.Console = New(Config{
		DB: db, APIs: []string{"s api"}, Groups: []Group{{Group: group, Queue: "s.group"}},
		Depths:  func(context.Context, []string) ([]rabbit.Depth, error) { return f.broker() },
		Dangers: func(context.Context) ([]rabbit.Danger, error) { return f.dangers, nil },
	})
	return f
}

func (f *fixture) exec(t *testing.T, sql string, args ...any) {
	t.Helper()
	if _, err := f.owner.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func (f *fixture) text(t *testing.T, sql string) (text string) {
	t.Helper()
	if err := f.owner.QueryRow(t.Context(), sql).Scan(&text); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return text
}

// letters inserts n dead letters with up to 1,000 keys.
func (f *fixture) letters(t *testing.T, n int) {
	t.Helper()
	f.exec(t, `INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
		SELECT 'group', gen_random_uuid()::text, 'google.protobuf.StringValue', 'k' || n % 1000, '\x0a0161',
			'{"h": "<b>"}', 'permanent', 'broken', 1
		FROM generate_series(1, $1::integer) AS n`, n)
}

func asAnn(t *testing.T) context.Context {
	return auth.As(t.Context(), auth.Caller{Subject: "ann", By: "apikey", Roles: []string{operatorRole}})
}

// recorder is a stream that records the responses.
type recorder struct {
	all []*opsv1.ResolveDeadLettersResponse
}

func (r *recorder) Send(m *opsv1.ResolveDeadLettersResponse) error {
	r.all = append(r.all, proto.CloneOf(m))
	return nil
}
func (r *recorder) last() *opsv1.ResolveDeadLettersResponse { return r.all[len(r.all)-1] }

func wantCode(t *testing.T, err error, want connect.Code) {
	t.Helper()
	if connect.CodeOf(err) != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// Every page takes the same time, since the query finds it by the last ID of the page before.
func TestPagingOf100000DeadLetters(t *testing.T) {
	t.Parallel()
	f := setup(t)
	const n = 100_000
	f.letters(t, n)
	f.exec(t, `ANALYZE dead_letter`)
	seen, before := 0, int64(n+1)
	var took []time.Duration
	for token := int64(0); ; {
		began := time.Now()
		page, err := f.ListDeadLetters(t.Context(), &opsv1.ListDeadLettersRequest{PageToken: token, Count: token == 0})
		if err != nil {
			t.Fatal(err)
		}
		if token == 0 && page.GetCount() != n {
			t.Errorf("count is %d", page.GetCount())
		}
		if token != 0 {
			took = append(took, time.Since(began))
		}
		for _, letter := range page.GetLetters() {
			if letter.GetId() >= before {
				t.Fatalf("dead letter %d follows %d", letter.GetId(), before)
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
	t.Logf("2,000 pages: median %s, 99th percentile %s", median, late)
	if seen != n || late > time.Second {
		t.Errorf("got %d dead letters, the 99th percentile of a page is %s", seen, late)
	}
	plan := f.text(t, `EXPLAIN (FORMAT JSON)
		SELECT id FROM dead_letter WHERE id < 50000 AND resolution IS NULL ORDER BY id DESC LIMIT 51`)
	indexed := strings.Contains(plan, "dead_letter_open_idx") || strings.Contains(plan, "dead_letter_pkey")
	if !indexed || strings.Contains(plan, `"Sort"`) {
		t.Errorf("the plan does not use an index: %s", plan)
	}
}

// Resolving by filter first reports the total, changes nothing in a dry run, and records actor and reason.
func TestResolve(t *testing.T) {
	t.Parallel()
	f := setup(t)
	f.letters(t, 3)
	f.exec(t, `INSERT INTO inbox (slot, consumer, message_id) SELECT -1, 'group', gen_random_uuid()`)
	all, first := &opsv1.DeadLetterFilter{}, &opsv1.DeadLetterFilter{Ids: []int64{1}}
	resolve := func(
		resolution opsv1.Resolution, dry bool, filter *opsv1.DeadLetterFilter,
	) *opsv1.ResolveDeadLettersResponse {
		t.Helper()
		stream := &recorder{}
		request := &opsv1.ResolveDeadLettersRequest{Filter: filter, Resolution: resolution, DryRun: dry, Reason: "why"}
		if err := f.resolve(asAnn(t), request, stream.Send); err != nil {
			t.Fatal(err)
		}
		return stream.last()
	}
	const redrive, discard = opsv1.Resolution_RESOLUTION_REDRIVE, opsv1.Resolution_RESOLUTION_DISCARD
	if got := resolve(redrive, true, all); got.GetTotal() != 3 || got.GetRedriven() != 3 || !got.GetDone() {
		t.Errorf("dry run: %v", got)
	}
	if open := f.text(t, `SELECT count(*)::text FROM dead_letter WHERE resolution IS NULL`); open != "3" {
		t.Errorf("%s dead letters are open after the dry run", open)
	}
	if got := resolve(discard, false, first); got.GetDiscarded() != 1 {
		t.Errorf("discard: %v", got)
	}
	if _, err := f.ReopenDeadLetter(asAnn(t), &opsv1.ReopenDeadLetterRequest{Id: 1, Reason: "mistake"}); err != nil {
		t.Error(err)
	}
	if got := resolve(redrive, false, all); got.GetRedriven() != 3 || got.GetUnresolved() != 0 {
		t.Errorf("redrive: %v", got)
	}
	if got := resolve(redrive, false, first); got.GetUnresolved() != 1 || got.GetProblem() == "" {
		t.Errorf("redriven twice: %v", got)
	}
	_, err := f.ReopenDeadLetter(asAnn(t), &opsv1.ReopenDeadLetterRequest{Id: 1, Reason: "mistake"})
	wantCode(t, err, connect.CodeFailedPrecondition)
	letter, err := f.GetDeadLetter(t.Context(), &opsv1.GetDeadLetterRequest{Id: 1})
	if err != nil {
		t.Fatal(err)
	}
	audit := ""
	for _, entry := range letter.GetAudit() {
		audit += fmt.Sprintf("%s by %s: %s; ", entry.GetAction(), entry.GetActor(), entry.GetReason())
	}
	if audit != "discarded by apikey:ann: why; reopened by apikey:ann: mistake; redriven by apikey:ann: why; " {
		t.Errorf("audit log: %s", audit)
	}
	if p := letter.GetPayload(); !p.GetDecoded() || p.GetText() != `"a"` {
		t.Errorf("payload %v", p)
	}
	_, err = f.GetDeadLetter(t.Context(), &opsv1.GetDeadLetterRequest{Id: 99})
	wantCode(t, err, connect.CodeNotFound)
}

func TestGroupsAndKeys(t *testing.T) {
	t.Parallel()
	f := setup(t)
	f.exec(t, `INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
		SELECT 'group', n::text, 't.T', 'k', '', '{}', 1, now(), 'broken' FROM generate_series(1, 3) AS n`)
	ctx := asAnn(t)
	if _, err := f.PauseGroup(ctx, &opsv1.PauseGroupRequest{Group: "group", Reason: "why"}); err != nil {
		t.Fatal(err)
	}
	_, err := f.PauseGroup(ctx, &opsv1.PauseGroupRequest{Group: "group", Reason: "why"})
	wantCode(t, err, connect.CodeFailedPrecondition)
	skipped, err := f.BuryKey(ctx, &opsv1.BuryKeyRequest{Group: "group", Key: "k", Reason: "why"})
	if err != nil || skipped.GetMoved() != 1 {
		t.Errorf("skip: %v, %v", skipped, err)
	}
	list, err := f.ListGroups(ctx, &opsv1.ListGroupsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if g := list.GetGroups()[0]; g.GetPausedBy() != "apikey:ann" || g.GetRetrying() != 2 || g.GetBlockedKeys() != 1 {
		t.Errorf("group %v", g)
	}
	if k := list.GetBlockedKeys(); len(k) != 1 || k[0].GetMessageId() != "2" || k[0].GetWaiting() != 2 {
		t.Errorf("blocked keys %v", k)
	}
	parked, err := f.BuryKey(ctx, &opsv1.BuryKeyRequest{Group: "group", Key: "k", Whole: true, Reason: "why"})
	if err != nil || parked.GetMoved() != 2 {
		t.Errorf("park: %v, %v", parked, err)
	}
	if _, err := f.ResumeGroup(ctx, &opsv1.ResumeGroupRequest{Group: "group", Reason: "why"}); err != nil {
		t.Error(err)
	}
	_, err = f.BuryKey(ctx, &opsv1.BuryKeyRequest{Group: "group", Key: "\x00", Reason: "why"})
	wantCode(t, err, connect.CodeInvalidArgument)
	if list, err = f.ListGroups(ctx, &opsv1.ListGroupsRequest{}); err != nil || len(list.GetAudit()) != 4 {
		t.Errorf("audit log %v, %v", list.GetAudit(), err)
	}
}

func TestMessages(t *testing.T) {
	t.Parallel()
	f := setup(t)
	payload, err := proto.Marshal(wrapperspb.String("<script>"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 120 {
		f.exec(t, `SELECT outbox_insert('google.protobuf.StringValue', $1::text, $2::bytea)`, fmt.Sprint("k", i%2), payload)
	}
	f.exec(t, `SELECT outbox_insert('unknown.Type', 'k', '\x00ff'::bytea)`)
	found := map[string]bool{}
	for token := int64(0); ; {
		page, err := f.SearchMessages(t.Context(), &opsv1.SearchMessagesRequest{Key: "k1", PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, message := range page.GetMessages() {
			found[message.GetMessageId()] = true
		}
		if token = page.GetNextPageToken(); token == 0 {
			break
		}
	}
	if len(found) != 60 {
		t.Errorf("found %d messages", len(found))
	}
	anHourAgo := timestamppb.New(time.Now().Add(-time.Hour))
	none, err := f.SearchMessages(t.Context(), &opsv1.SearchMessagesRequest{Until: anHourAgo})
	if err != nil || len(none.GetMessages()) != 0 {
		t.Errorf("until an hour ago: %v, %v", none, err)
	}
	newest, err := f.SearchMessages(t.Context(), &opsv1.SearchMessagesRequest{})
	if err != nil || len(newest.GetMessages()) != pageRows || newest.GetMessages()[0].GetType() != "unknown.Type" {
		t.Fatalf("newest: %v, %v", newest, err)
	}
	for i, want := range []string{"00000000  00 ff", `"\u003cscript\u003e"`} {
		id := newest.GetMessages()[i].GetMessageId()
		message, err := f.GetMessage(t.Context(), &opsv1.GetMessageRequest{MessageId: id})
		if err != nil || len(message.GetSteps()) != 2 {
			t.Fatalf("%v, %v", message, err)
		}
		if text := message.GetPayload().GetText(); !strings.HasPrefix(text, want) && text != `"<script>"` {
			t.Errorf("payload %q", text)
		}
	}
	invalid := &timestamppb.Timestamp{Seconds: 1 << 60}
	_, err = f.SearchMessages(t.Context(), &opsv1.SearchMessagesRequest{Since: invalid})
	wantCode(t, err, connect.CodeInvalidArgument)
	_, err = f.ListDeadLetters(t.Context(), &opsv1.ListDeadLettersRequest{PageToken: 1 << 62})
	if err != nil {
		t.Errorf("a page token beyond the last page: %v", err)
	}
	_, err = f.GetMessage(t.Context(), &opsv1.GetMessageRequest{MessageId: "nobody"})
	wantCode(t, err, connect.CodeNotFound)
}

func TestFaultsAreShownWhereTheyAre(t *testing.T) {
	t.Parallel()
	f := setup(t)
	const (
		relaySQL = `
			INSERT INTO outbox_relay (owner, expires_at, lease) VALUES ('r', now() + interval '1 hour', '1 hour')`
		leaseSQL = `
			UPDATE outbox_cursor SET owner = 'r', lease_expires_at = now() + interval '1 hour', lease = '1 hour'`
		consumerSQL = `
			INSERT INTO inbox_consumer (consumer, owner, applied, lag, expires_at, lease)
			VALUES ('group', 'c', 5, 0.01, now() + interval '1 hour', '1 hour')`
	)
	for _, sql := range []string{relaySQL, leaseSQL, consumerSQL} {
		f.exec(t, sql)
	}
	api, err := session.Connect(t.Context(), f.owner.Config().ConnString())
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close(t.Context())
	if _, err := api.Exec(t.Context(), `SET application_name = 's api'`); err != nil {
		t.Fatal(err)
	}
	faults := func() string {
		var texts []string
		for _, station := range newSampler(f.Console).sample(t.Context()).GetStations() {
			if station.GetState() != fine {
				texts = append(texts, fmt.Sprintf("%s: %s", station.GetName(), station.GetSentence()))
			}
		}
		return strings.Join(texts, "\n")
	}
	if got := faults(); got != "" {
		t.Fatalf("faults of a healthy service:\n%s", got)
	}
	for name, test := range map[string]struct{ do, undo, want string }{
		"NoRelay": {`DELETE FROM outbox_relay`, relaySQL, "relay: No relay is running."},
		"NoLease": {
			`UPDATE outbox_cursor SET lease_expires_at = now()`, leaseSQL, "relay: No relay holds the lease of shard 0.",
		},
		"RelayBlocked": {
			`UPDATE outbox_relay SET problem = 'blocked'`, `UPDATE outbox_relay SET problem = ''`,
			"relay: It cannot publish: blocked",
		},
		"NoConsumer": {`DELETE FROM inbox_consumer`, consumerSQL, "group: No process runs this group."},
		"Paused": {
			`INSERT INTO inbox_pause (consumer, actor, reason) VALUES ('group', 'ann', 'why')`,
			`DELETE FROM inbox_pause`, "group: Paused by ann: why",
		},
		"BlockedKey": {
			`INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
			VALUES ('group', 'm', 't', 'k', '', '{}', 1, now(), '')`,
			`DELETE FROM inbox_retry`, "group: 1 key waits for a retry, the longest for ",
		},
	} {
		f.exec(t, test.do)
		if got := faults(); !strings.HasPrefix(got, test.want) || strings.Contains(got, "\n") {
			t.Errorf("%s:\n%s", name, got)
		}
		f.exec(t, test.undo)
	}
	f.dangers = []rabbit.Danger{
		{Queue: "other.dead", Policy: "limits", Setting: "expires=1", Loses: true},
		{Queue: "s.group", Policy: "limits", Setting: "max-length=9"},
		{
			Queue: "s.group.dead", Policy: "limits", Setting: "message-ttl=60000", Effect: "older messages are lost",
			Loses: true,
		},
	}
	if got := faults(); got != "s.group: Messages can be lost: "+
		"policy limits sets message-ttl=60000 on queue s.group.dead: older messages are lost." {
		t.Errorf("policy:\n%s", got)
	}
	f.broker = func() ([]rabbit.Depth, error) {
		return nil, errors.New("connect to rabbitmq: dial tcp: connection\nrefused")
	}
	if got := faults(); got != "RabbitMQ: The broker cannot be reached: connection refused.\n"+
		"s.group: Unknown while the broker is unreachable." {
		t.Errorf("broker unreachable:\n%s", got)
	}
	f.db.Close()
	if got := faults(); !strings.Contains(got, "outbox: The database cannot be reached: ") {
		t.Errorf("database unreachable:\n%s", got)
	}
}

// 60 minutes of samples use as much memory as 15 minutes: the ring buffer does not grow.
func TestTheFlowDoesNotGrow(t *testing.T) {
	t.Parallel()
	f := newFlow()
	for i := range 3600 {
		f.add(&opsv1.WatchFlowResponse{Point: &opsv1.Point{Backlog: int64(i)}})
	}
	history := f.history()
	if len(f.points) != maxPoints || cap(f.points) > 2*maxPoints || len(history) != maxPoints-1 {
		t.Errorf("%d points (capacity %d), %d in the history", len(f.points), cap(f.points), len(history))
	}
	for i, point := range history {
		if point.GetBacklog() != int64(3600-maxPoints+i) {
			t.Fatalf("point %d of the history is %d", i, point.GetBacklog())
		}
	}
}

// Rates are right although the counter of a process disappears when the process ends.
func TestRatesSurviveARestart(t *testing.T) {
	t.Parallel()
	f := setup(t)
	s := newSampler(f.Console)
	at := time.Now()
	var last *rates
	for i, applied := range []int64{100, 110, 120, 5, 15} {
		owner := "first"
		if i >= 3 {
			owner = "second"
		}
		f.exec(t, `DELETE FROM inbox_consumer`)
		f.exec(t, `INSERT INTO inbox_consumer (consumer, owner, applied, expires_at, lease)
			VALUES ('group', $1, $2, now() + interval '1 hour', '1 hour')`, owner, applied)
		last = s.measure(at.Add(time.Duration(i)*time.Second), s.read(t.Context()))
	}
	if got := last.applied["group"]; got != 35.0/4 {
		t.Errorf("rate is %g per second", got)
	}
}
