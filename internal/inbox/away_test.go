package inbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// setupProxied is setup with a second connection to the database, through a proxy that can cut it.
func setupProxied(t *testing.T, config Config) (*bundle, *Inbox, *testenv.TCPProxy) {
	t.Helper()
	b := setup(t)
	server := b.db.Config().ConnConfig
	proxy := testenv.Proxy(t, net.JoinHostPort(server.Host, strconv.Itoa(int(server.Port))))
	return b, New(openVia(t, b, func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, proxy.Addr())
	}), b.group, config), proxy
}

// breaksTheConnection returns an act that cuts all connections through the proxy, including its own.
func breaksTheConnection(proxy *testenv.TCPProxy) act {
	return func(ctx context.Context, tx pgx.Tx) error {
		proxy.Cut()
		_, err := tx.Exec(ctx, `SELECT 1`)
		return err
	}
}

func TestDatabaseAway(t *testing.T) {
	t.Parallel()

	t.Run("CutInTheMiddleOfABatch", func(t *testing.T) {
		t.Parallel()
		b, p, proxy := setupProxied(t, eager)
		batch, texts := probes(5)
		nameless := probe("", "nameless")
		nameless.ID = ""
		batch = append(batch, nameless)
		b.on(texts[2], breaksTheConnection(proxy))
		for range 4 { // more often than a message may fail
			wantAway(t, p.Process(t.Context(), batch))
		}
		b.wantEffects(t)
		b.wantWaiting(t)
		b.wantDead(t) // not even the message without an ID: its dead letter would be repeated
		b.on(texts[2], nil)
		process(t, p, batch...)
		b.wantEffects(t, texts...)
		b.wantCopies(t, batch[0], 1)
		b.wantDead(t, "no_id 0")
	})

	t.Run("RefusedFromTheStart", func(t *testing.T) {
		t.Parallel()
		b, p, proxy := setupProxied(t, eager)
		proxy.Refuse(true)
		message := probe("", "one")
		wantAway(t, p.Process(t.Context(), []messaging.Delivery{message}))
		if _, err := p.RetryNext(t.Context()); !errors.Is(err, postgres.ErrUnavailable) {
			t.Errorf("retry: got error %v", err)
		}
		proxy.Refuse(false)
		process(t, p, message)
		b.wantEffects(t, "one")
	})

	// The batch fails for another reason, and the database becomes unavailable while the messages run one by one.
	t.Run("CutWhileRunOneByOne", func(t *testing.T) {
		t.Parallel()
		b, p, proxy := setupProxied(t, eager)
		b.on("bad", fails)
		runs := 0
		b.on("victim", func(ctx context.Context, tx pgx.Tx) error {
			if runs++; runs == 1 {
				return breaksTheConnection(proxy)(ctx, tx)
			}
			return nil
		})
		batch := []messaging.Delivery{probe("", "good"), probe("k", "bad"), probe("k", "behind"), probe("", "victim")}
		wantAway(t, p.Process(t.Context(), batch))
		b.wantEffects(t, "good")
		b.wantWaiting(t, "bad 1/1", "behind 0/0")
		process(t, p, batch...)
		b.wantEffects(t, "good", "victim")
		b.wantWaiting(t, "bad 1/1", "behind 0/0")
	})

	t.Run("RetryCostsNothing", func(t *testing.T) {
		t.Parallel()
		b, p, proxy := setupProxied(t, eager)
		b.on("one", fails)
		process(t, p, probe("k", "one"))
		b.on("one", breaksTheConnection(proxy))
		for range 2 * maxCrashes {
			_, err := p.RetryNext(t.Context())
			wantAway(t, err)
			undone(t, p)
			b.wantWaiting(t, "one 1/1")
		}
		b.on("one", nil)
		retryAll(t, p)
		b.wantEffects(t, "one")
	})
}

// undone waits until all aborted runs are undone. A starved machine needs longer than the inbox waits itself.
func undone(t *testing.T, b *Inbox) {
	t.Helper()
	testenv.Eventually(t, 30*time.Second, func() error {
		err := b.undoRuns(t.Context())
		if left := len(b.aborted.all()); err == nil && left > 0 {
			err = fmt.Errorf("%d runs are not undone", left)
		}
		return err
	})
}

func TestCancelledContextCostsNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ctx, cancel := context.WithCancel(t.Context())
	p, message := b.inbox(eager), probe("k", "one")
	b.on("one", func(context.Context, pgx.Tx) error { cancel(); return errProbe })
	if err := p.Process(ctx, []messaging.Delivery{message}); !errors.Is(err, context.Canceled) {
		t.Errorf("process: got error %v", err)
	}
	b.wantWaiting(t)
	b.on("one", fails)
	process(t, p, message)
	for range 2 * maxCrashes {
		ctx, cancel := context.WithCancel(t.Context())
		b.on("one", func(context.Context, pgx.Tx) error { cancel(); return errProbe })
		if _, err := p.RetryNext(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("retry: got error %v", err)
		}
		undone(t, p)
		b.wantWaiting(t, "one 1/1")
	}
	b.wantDead(t)
}

// TestCrashedRuns makes the process of a retry die from the database's point of view: the claim exists, and no process
// settles it.
func TestCrashedRuns(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		count int64
		want  []string
	}{
		// It has killed two processes already.
		"OfAMessageSetAsideUnhandled": {maxBreaks, []string{"killer 0/1", "killer 0/2", "killer 0/3"}},
		"OfAMessageThatFailedBefore":  {0, []string{"killer 1/2", "killer 1/3", "killer 1/4"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, p, proxy := setupProxied(t, Config{RetryBase: 1})
			killer := probe("k", "killer")
			killer.Count = test.count
			b.on("killer", fails)
			process(t, p, killer, probe("k", "behind"))
			before := b.ran("killer")
			b.on("killer", func(ctx context.Context, tx pgx.Tx) error {
				proxy.Refuse(true) // so the process cannot undo the run
				return breaksTheConnection(proxy)(ctx, tx)
			})
			for _, want := range test.want {
				_, err := p.RetryNext(t.Context())
				wantAway(t, err)
				proxy.Refuse(false)
				b.wantWaiting(t, want, "behind 0/0")
				p = New(p.db, b.group, p.config) // a new process, which does not know of the aborted run
				if retryOne(t, p) {
					t.Error("claimed again although the claim has not expired")
				}
				b.makeDue(t) // the claim expires
			}
			retryAll(t, p)
			if runs := b.ran("killer") - before; runs != maxCrashes {
				t.Errorf("the handler was started %d times, want %d", runs, maxCrashes)
			}
			b.wantKept(t, deadletter.Crashed, killer.Payload)
			b.wantEffects(t, "behind")
		})
	}
}

// TestExpiredClaim is about a process that was frozen and continues after another process has claimed the message.
func TestExpiredClaim(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.on("one", fails)
	p := b.inbox(eager)
	process(t, p, probe("k", "one"))
	frozen, err := p.claim(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b.on("one", fails)
	b.makeDue(t)
	retryOne(t, p) // another process claims it and fails, which clears the runs
	b.wantWaiting(t, "one 2/2")
	for name, late := range map[string]func() error{
		"Remove": func() error {
			return postgres.Transact(t.Context(), b.db, func(tx pgx.Tx) error {
				return p.remove(t.Context(), tx, frozen)
			})
		},
		"Give up": func() error {
			return p.retryFailed(t.Context(), frozen, &failure{messaging.Permanent(errProbe)})
		},
		"Postpone": func() error { return p.retryFailed(t.Context(), frozen, &failure{errProbe}) },
	} {
		if err := late(); !errors.Is(err, errClaimLost) {
			t.Errorf("%s: got error %v", name, err)
		}
	}
	p.abort(t.Context(), frozen)
	b.wantWaiting(t, "one 2/2")
	b.wantDead(t)
}

func TestAnswerOfCommitLost(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var cut atomic.Int32 // n means that the n-th COMMIT from now on loses its answer
	p := New(openVia(t, b, func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		return &commitCutter{Conn: conn, left: &cut}, err
	}), b.group, eager)
	wantUnknown := func(err error) {
		t.Helper()
		if !errors.Is(err, postgres.ErrOutcomeUnknown) {
			t.Errorf("got error %v, want one that wraps ErrOutcomeUnknown", err)
		}
	}
	processAll := func(d ...messaging.Delivery) error { return p.Process(t.Context(), d) }

	good, bad := probe("", "one"), probe("k", "bad")
	cut.Store(1)
	wantUnknown(processAll(good))
	b.wantEffects(t, "one")
	process(t, p, good)
	b.wantEffects(t, "one")

	// A message fails and is set aside.
	b.on("bad", fails)
	cut.Store(1)
	wantUnknown(processAll(bad))
	process(t, p, bad)
	b.wantWaiting(t, "bad 1/1")

	// A retry fails and is postponed; the first COMMIT is that of the claim.
	cut.Store(2)
	_, err := p.RetryNext(t.Context())
	wantUnknown(err)
	b.wantWaiting(t, "bad 2/2")

	// A retry succeeds.
	b.on("bad", nil)
	cut.Store(2)
	_, err = p.RetryNext(t.Context())
	wantUnknown(err)
	b.wantWaiting(t)
	retryAll(t, p)
	b.wantEffects(t, "one", "bad")
	b.wantDead(t)
}

// commitCutter is a connection that loses the answer to a COMMIT.
type commitCutter struct {
	net.Conn
	left *atomic.Int32
	cut  atomic.Bool
}

// Read waits for the answer, so that the commit is certainly done, and then cuts the connection.
func (c *commitCutter) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if bytes.Contains(p[:n], []byte("COMMIT\x00")) && c.left.Add(-1) == 0 {
		c.cut.Store(true)
	}
	if c.cut.Load() {
		c.Conn.Close()
		return 0, io.ErrUnexpectedEOF
	}
	return n, err
}

// openVia opens a second pool on the test's database.
func openVia(t *testing.T, b *bundle, dial func(context.Context, string, string) (net.Conn, error)) *pgxpool.Pool {
	t.Helper()
	config := b.db.Config()
	config.ConnConfig.DialFunc = dial
	db, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return db
}
