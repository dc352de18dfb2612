package app

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/changes"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/outbox"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// twoGroups gives a process two groups, which write every text down in the table effects.
func twoGroups(*pgxpool.Pool, *outbox.Writer, *changes.Hub) domain {
	named := func(name string) group {
		g := inbox.NewGroup(name)
		inbox.Handle(g, func(ctx context.Context, tx pgx.Tx, text *wrapperspb.StringValue) error {
			if text.GetValue() == "fails" {
				return errors.New("the warehouse does not answer")
			}
			_, err := tx.Exec(ctx, `INSERT INTO effects (effect) VALUES ($1)`, name+" "+text.GetValue())
			return err
		})
		return group{g, 1}
	}
	return domain{register: func(*connect.Server) {}, groups: []group{named("shipping"), named("billing")}}
}

// corpus are texts that become scripts where somebody forgets that they are texts.
var corpus = []string{
	`<script>window.pwned=1</script>`, `<img src=x onerror="window.pwned=1">`, `"><svg onload=window.pwned=1>`, `javascript:window.pwned=1`,
	`'-(window.pwned=1)-'`, "</textarea></title><iframe srcdoc='<script>parent.pwned=1</script>'>", `{{constructor.constructor('window.pwned=1')()}}`,
	"\u202eevil\u202c \u0085\u2028", `<a href="javascript:window.pwned=1" autofocus onfocus=window.pwned=1>`, strings.Repeat("W", 200),
}

// The console is used in a real browser, against the whole service on real servers, whose broker is taken away meanwhile. It stands behind a proxy that
// puts a path before its own, as where one host serves several services. What it looked like is in
// .stack/screenshots afterwards.
func TestConsoleInABrowser(t *testing.T) {
	t.Parallel()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	chromium := browser(t, root)
	db := testenv.Postgres(t)
	effectsIn(t, db)
	broker, amqpURL := testenv.ProxyURL(t, testenv.AMQP(t))
	keys, lines := apiKeys(t, "operator")
	address := testenv.FreeAddress(t)
	all := start(t, RunAll, Config{
		PostgresURL: db.Config().ConnString(), AMQPURL: amqpURL, Exchange: "events", ConsoleAddr: address, Edge: Edge{APIKeys: lines}, domain: twoGroups, Version: "test",
	})
	await(t, "all", all.ready, http.StatusOK)
	p := &person{t: t, db: db}
	p.use(map[string]string{
		"url": underPath(t, "/some/path", address), "key": keys["operator"], "chromium": chromium, "screenshots": filepath.Join(root, ".stack", "screenshots"),
	}, map[string]func() error{
		"messages":             p.send,
		"break broker":         func() error { broker.Refuse(true); broker.Cut(); return nil },
		"mend broker":          func() error { broker.Refuse(false); return nil },
		"corpus":               p.corpus,
		"effect of the letter": func() error { return p.has("shipping a plain text") },
	})
}

// underPath serves what is at the address under a path, and returns its URL there.
func underPath(t *testing.T, path, address string) string {
	t.Helper()
	proxy := httptest.NewServer(http.StripPrefix(path, &httputil.ReverseProxy{
		FlushInterval: -1,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: address})
			r.Out.Host = r.In.Host // the console compares it with the page's origin
		},
	}))
	t.Cleanup(proxy.Close)
	return proxy.URL + path
}

// browser returns the path of a Chromium, which is installed if there is none, with what drives it.
func browser(t *testing.T, root string) (path string) {
	t.Helper()
	find := func() string {
		for _, name := range []string{"chromium", "google-chrome", "chromium-browser"} {
			if path, err := exec.LookPath(name); err == nil {
				return path
			}
		}
		return ""
	}
	path = find()
	script := "bash scripts/packages.sh web"
	if path == "" {
		script += " && bash scripts/need.sh chromium chromium"
	}
	install := exec.Command("bash", "-c", script)
	install.Dir = root
	if output, err := install.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	if path = cmp.Or(path, find()); path == "" {
		t.Fatal("there is no Chromium")
	}
	return path
}

// person is who uses the console, and what is done to the stack meanwhile.
type person struct {
	t  *testing.T
	db *pgxpool.Pool
}

// use runs the browser, and does what it asks for.
func (p *person) use(config map[string]string, deeds map[string]func() error) {
	p.t.Helper()
	text, err := json.Marshal(config)
	if err != nil {
		p.t.Fatal(err)
	}
	command := exec.CommandContext(p.t.Context(), "node", "console/test/browser.mjs", string(text))
	command.Dir, command.WaitDelay = filepath.Join("..", "..", "web"), time.Second
	stdin, err1 := command.StdinPipe()
	stdout, err2 := command.StdoutPipe()
	command.Stderr = p.t.Output()
	if err := errors.Join(err1, err2, command.Start()); err != nil {
		p.t.Fatal(err)
	}
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		what, rest, _ := strings.Cut(lines.Text(), " ")
		switch deed := deeds[rest]; {
		case what == "problem":
			p.t.Error(rest)
		case what == "do" && deed != nil:
			if err := deed(); err != nil {
				p.t.Errorf("%s: %v", rest, err)
			}
			_, _ = io.WriteString(stdin, "done\n") // if it has ended, Wait says so
		default:
			p.t.Log(lines.Text())
		}
	}
	if err := command.Wait(); err != nil {
		p.t.Errorf("browser: %v", err)
	}
}

// send sends some messages over several seconds' worth of keys.
func (p *person) send() error {
	for i := range 300 {
		if err := send(p.t.Context(), p.db, fmt.Sprintf("customer-%d", i%10), fmt.Sprintf("order %d", i)); err != nil {
			return err
		}
	}
	return nil
}

// has waits for an effect.
func (p *person) has(effect string) error {
	testenv.Eventually(p.t, 20*time.Second, func() error {
		var found bool
		err := p.db.QueryRow(p.t.Context(), `SELECT EXISTS (SELECT FROM effects WHERE effect = $1)`, effect).Scan(&found)
		if err == nil && !found {
			err = errors.New("no such effect")
		}
		return err
	})
	return nil
}

// corpus puts hostile texts into every field that the console shows, and what else there is to be acted on.
func (p *person) corpus() error {
	ctx := p.t.Context()
	const letterSQL = `INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
		VALUES ($1, $2, $3, $4, $5, jsonb_build_object($2::text, $2::text), $6, $7, 3)`
	var errs []error
	exec := func(sql string, args ...any) {
		_, err := p.db.Exec(ctx, sql, args...)
		errs = append(errs, err)
	}
	for i, text := range corpus {
		exec(letterSQL, text, text, text, text, []byte(text), []string{"permanent", "no_id", "exhausted"}[i%3], text)
		exec(`INSERT INTO operation (id, caller, idempotency_key, method, request, request_hash, identity, signature)
			VALUES (outbox_uuidv7(), $1, '', $1, '', '', '', '')`, text)
		exec(`INSERT INTO operator_audit (action, target, reason, actor, detail) VALUES ($1, $1, $1, $1, $1)`, text)
		exec(`INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
			VALUES ($1, $1, $1, $1, '', '{}', 3, now() + interval '1 hour', $1)`, text)
		errs = append(errs, send(ctx, p.db, text, text))
	}
	const plain = "0190c0de-0000-7000-8000-000000000001"
	exec(letterSQL, "shipping", plain, "google.protobuf.StringValue", "plain", []byte("\x0a\x0ca plain text"), "permanent", "the address is incomplete")
	for i := range 3 {
		exec(letterSQL, "billing", fmt.Sprintf("0190c0de-0000-7000-8000-00000000010%d", i), "google.protobuf.StringValue", fmt.Sprintf("customer-%d", i),
			[]byte("\x0a\x07order 7"), "exhausted", "the bank does not answer: context deadline exceeded")
	}
	exec(`INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
		SELECT 'shipping', gen_random_uuid()::text, 'google.protobuf.StringValue', 'blocked-key', '', '{}', 4, now() + interval '1 hour', 'the warehouse does not answer'
		FROM generate_series(1, 3)`)
	return errors.Join(errs...)
}
