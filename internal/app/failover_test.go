package app

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/dev/probe"
	"example.com/shop/internal/dev/testenv"
	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

// written is probed with a method that writes its text to the table effects, unless the table contains it.
func written(config Config) Config {
	config = probed(config)
	config.domain = func(d deps) (domain, error) {
		return domain{register: func(server *connect.Server) {
			probe.Handle(server, probe.Mutate, func(ctx context.Context, text string) (answer string, err error) {
				err = d.out.Transact(ctx, func(tx pgx.Tx) error {
					tag, err := tx.Exec(ctx, `INSERT INTO effects (effect) VALUES ($1) ON CONFLICT DO NOTHING`, text)
					answer = fmt.Sprintf("%s, %d now", text, tag.RowsAffected())
					return err
				})
				return answer, err
			})
		}}, nil
	}
	return config
}

// withHeader returns a context whose calls have the given headers.
func withHeader(ctx context.Context, pairs ...string) context.Context {
	ctx, info := connect.NewClientContext(ctx)
	for i := 0; i < len(pairs); i += 2 {
		info.RequestHeader().Set(pairs[i], pairs[i+1])
	}
	return ctx
}

// call is a call with an effect that a repeat finds done.
type call func(client *connect.Client) error

func TestDoneAlreadySurvivesAFailover(t *testing.T) {
	t.Parallel()
	testFailover(t, 2, func(*connect.Client) map[string]call {
		return map[string]call{
			"a row": func(client *connect.Client) error {
				_, err := probe.Call(t.Context(), client, probe.Mutate, "row")
				return err
			},
			"a key": func(client *connect.Client) error {
				_, err := probe.Call(withHeader(t.Context(), "Idempotency-Key", "key"), client, probe.Mutate, "key")
				return err
			},
		}
	})
}

// A call that finds its effect done reports success only if no failover can undo the effect. Here the standby is down:
// the first call commits on the primary, and its caller gets an unknown outcome. A repeat finds the row, and must get
// an unknown outcome, too. prepare runs while the standby is up.
func testFailover(t *testing.T, effects int, prepare func(before *connect.Client) map[string]call) {
	t.Helper()
	primary, standby := testenv.Replicated(t)
	owner, err := pgx.Connect(t.Context(), primary.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer owner.Close(context.WithoutCancel(t.Context()))
	const tableSQL = `CREATE TABLE effects (effect text PRIMARY KEY); GRANT ALL ON effects TO shop_api`
	if _, err := owner.Exec(t.Context(), tableSQL); err != nil {
		t.Fatal(err)
	}
	client := func(url string) *connect.Client {
		config := Config{PostgresURL: testenv.As(t, url, "shop_api"), Edge: Edge{NoAuth: true}}
		served := start(t, RunAPI, written(config))
		await(t, "API", served.ready, http.StatusOK)
		return connect.NewClient(connecthttp.NewTransport(web, served.url))
	}
	before := client(primary.URL())
	calls := prepare(before)
	standby.Stop()
	for _, which := range []string{"first", "repeated"} {
		var all errgroup.Group
		for name, call := range calls {
			all.Go(func() error {
				var answer *connect.Error
				err := call(before)
				if !errors.As(err, &answer) || !strings.Contains(answer.Message(), "outcome is unknown") {
					t.Errorf("%s, %s: %v, want an unknown outcome", name, which, err)
				}
				return nil
			})
		}
		_ = all.Wait()
	}
	var rows int
	if err := owner.QueryRow(t.Context(), `SELECT count(*) FROM effects`).Scan(&rows); err != nil || rows != effects {
		t.Errorf("%d rows on the primary, %v, want the %d that the repeats must find", rows, err, effects)
	}
	primary.Kill()
	after := client(standby.Promote())
	for name, call := range calls {
		if err := call(after); err != nil {
			t.Errorf("%s, after the failover: %v", name, err)
		}
	}
}
