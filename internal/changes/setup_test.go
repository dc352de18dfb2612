package changes

import (
	"context"
	"errors"
	"iter"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/session"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// never is an interval that does not end during a test, so that only rings can cause reads.
const never = time.Hour

// process is a hub with a topic of probes, which are rows of a table with a text each.
type process struct {
	*Topic[*wrapperspb.StringValue]
	hub   *Hub
	db    *pgxpool.Pool
	reads atomic.Int64 // statements that read probes
	away  atomic.Bool  // reads fail
}

// newDatabase returns the URL of a database with a table of probes.
func newDatabase(t *testing.T) string {
	t.Helper()
	url := testenv.PostgresURL(t)
	err := session.With(t.Context(), url, func(conn *pgx.Conn) error {
		_, err := conn.Exec(t.Context(), `CREATE TABLE probe (key text PRIMARY KEY, value text NOT NULL)`)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return url
}

// start runs a process until the test ends.
func start(t *testing.T, url string, config Config) *process {
	t.Helper()
	p := newProcess(t, url, config)
	p.run(t, p.hub.Ring)
	p.run(t, p.hub.Follow)
	return p
}

func newProcess(t *testing.T, url string, config Config) *process {
	t.Helper()
	p := &process{hub: New(config)}
	parsed, err := pgxpool.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	parsed.ConnConfig.Tracer = p
	if p.db, err = pgxpool.NewWithConfig(t.Context(), parsed); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.db.Close)
	p.Topic = NewTopic(p.hub, "probe", p.read)
	return p
}

// run runs a loop of the hub, until the test ends or stop is called.
func (p *process) run(t *testing.T, loop func(context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() { loop(ctx) })
	stop = func() { cancel(); running.Wait() }
	t.Cleanup(stop)
	return stop
}

const readSQL = `SELECT key, value FROM probe WHERE key = ANY ($1)`

func (p *process) read(ctx context.Context, keys []string) (map[string]*wrapperspb.StringValue, error) {
	if p.away.Load() {
		return nil, postgres.ErrUnavailable
	}
	rows, _ := p.db.Query(ctx, readSQL, keys)
	states := map[string]*wrapperspb.StringValue{}
	var key, value string
	_, err := pgx.ForEachRow(rows, []any{&key, &value}, func() error {
		states[key] = wrapperspb.String(value)
		return nil
	})
	return states, err
}

// TraceQueryStart implements pgx.QueryTracer.
func (p *process) TraceQueryStart(ctx context.Context, _ *pgx.Conn, query pgx.TraceQueryStartData) context.Context {
	if strings.HasPrefix(query.SQL, readSQL) {
		p.reads.Add(1)
	}
	return ctx
}

// TraceQueryEnd implements pgx.QueryTracer.
func (p *process) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// set commits a value for keys and touches them.
func (p *process) set(t *testing.T, value string, keys ...string) {
	t.Helper()
	err := postgres.Transact(t.Context(), p.db, func(tx pgx.Tx) error {
		p.Touch(tx, keys...)
		_, err := tx.Exec(t.Context(), `
			INSERT INTO probe SELECT key, $2 FROM unnest($1::text[]) AS key
			ON CONFLICT (key) DO UPDATE SET value = excluded.value`, keys, value)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// watch is a watcher from which a test pulls one state after another.
type watch struct {
	next func() (*wrapperspb.StringValue, error, bool)
}

// watch watches a key until the test ends.
func (p *process) watch(t *testing.T, key string) watch {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 30*time.Second)
	next, stop := iter.Pull2(p.Watch(ctx, key))
	t.Cleanup(func() { stop(); cancel() })
	return watch{next}
}

func (w watch) want(t *testing.T, value string) {
	t.Helper()
	if got, err, _ := w.next(); err != nil || got.GetValue() != value {
		t.Fatalf("got %q, %v, want %q", got.GetValue(), err, value)
	}
}

func (w watch) wantError(t *testing.T, want error) {
	t.Helper()
	if got, err, _ := w.next(); !errors.Is(err, want) {
		t.Fatalf("got %q, %v, want error %v", got.GetValue(), err, want)
	}
	if _, _, more := w.next(); more {
		t.Error("the watcher yields after an error")
	}
}
