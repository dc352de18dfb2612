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
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/inbox"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// twoGroups gives a process two groups, which write every text to the table effects.
func twoGroups(deps) (domain, error) {
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
	return domain{register: func(*connect.Server) {}, groups: []group{named("shipping"), named("billing")}}, nil
}

// corpus contains texts that run as scripts in a page that fails to escape them.
var corpus = []string{
	`<script>window.pwned=1</script>`, `<img src=x onerror="window.pwned=1">`, `"><svg onload=window.pwned=1>`,
	`javascript:window.pwned=1`, `'-(window.pwned=1)-'`,
	"</textarea></title><iframe srcdoc='<script>parent.pwned=1</script>'>",
	`{{constructor.constructor('window.pwned=1')()}}`, "\u202eevil\u202c \u0085\u2028",
	`<a href="javascript:window.pwned=1" autofocus onfocus=window.pwned=1>`, strings.Repeat("W", 200),
}

// A real browser uses the console of the whole service on real servers, and the broker fails meanwhile. The console is
// behind a proxy that adds a prefix to its paths, as if one host served several services. Screenshots are written to
// .stack/screenshots.
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
		PostgresURL: db.Config().ConnString(), AMQPURL: amqpURL, Exchange: "events",
		Edge: Edge{APIKeys: lines}, domain: twoGroups, Version: "test",
		Features: Features{Console: Console{Addr: address}},
	})
	await(t, "all", all.ready, http.StatusOK)
	s := &browserSession{t: t, db: db}
	s.run(map[string]string{
		"url": underPath(t, "/some/path", address), "key": keys["operator"], "chromium": chromium,
		"screenshots": filepath.Join(root, ".stack", "screenshots"),
	}, map[string]func() error{
		"messages":              s.send,
		"stop broker":           func() error { broker.Refuse(true); broker.Cut(); return nil },
		"start broker":          func() error { broker.Refuse(false); return nil },
		"corpus":                s.corpus,
		"effect of the redrive": func() error { return s.awaitEffect("shipping a plain text") },
	})
}

// underPath serves the address through a proxy that adds the path as a prefix, and returns the URL.
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

// browser returns the path of Chromium. It installs Chromium and its driver if they are missing.
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
		t.Fatal("Chromium is not installed")
	}
	return path
}

// browserSession runs a browser, and changes the stack on the browser's request.
type browserSession struct {
	t  *testing.T
	db *pgxpool.Pool
}

// run runs the browser, and the actions that it requests.
func (s *browserSession) run(config map[string]string, actions map[string]func() error) {
	s.t.Helper()
	text, err := json.Marshal(config)
	if err != nil {
		s.t.Fatal(err)
	}
	command := exec.CommandContext(s.t.Context(), "node", "console/test/browser.mjs", string(text))
	command.Dir, command.WaitDelay = filepath.Join("..", "..", "web"), time.Second
	stdin, err1 := command.StdinPipe()
	stdout, err2 := command.StdoutPipe()
	command.Stderr = s.t.Output()
	if err := errors.Join(err1, err2, command.Start()); err != nil {
		s.t.Fatal(err)
	}
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		what, rest, _ := strings.Cut(lines.Text(), " ")
		switch action := actions[rest]; {
		case what == "problem":
			s.t.Error(rest)
		case what == "do" && action != nil:
			if err := action(); err != nil {
				s.t.Errorf("%s: %v", rest, err)
			}
			_, _ = io.WriteString(stdin, "done\n") // if the browser has ended, Wait returns the error
		case what == "do": // without an answer the browser would wait forever
			_ = command.Process.Kill()
			s.t.Errorf("the browser requests an unknown action: %s", rest)
		default:
			s.t.Log(lines.Text())
		}
	}
	if err := command.Wait(); err != nil {
		s.t.Errorf("browser: %v", err)
	}
}

// send sends 300 messages with ten keys.
func (s *browserSession) send() error {
	for i := range 300 {
		if err := send(s.t.Context(), s.db, fmt.Sprintf("customer-%d", i%10), fmt.Sprintf("order %d", i)); err != nil {
			return err
		}
	}
	return nil
}

// awaitEffect waits for an effect.
func (s *browserSession) awaitEffect(effect string) error {
	testenv.Eventually(s.t, 20*time.Second, func() error {
		var found bool
		const sql = `SELECT EXISTS (SELECT FROM effects WHERE effect = $1)`
		err := s.db.QueryRow(s.t.Context(), sql, effect).Scan(&found)
		if err == nil && !found {
			err = fmt.Errorf("there is no effect %q", effect)
		}
		return err
	})
	return nil
}

// corpus puts hostile texts into every field that the console shows, and adds the rows that the browser acts on.
func (s *browserSession) corpus() error {
	ctx := s.t.Context()
	const letterSQL = `INSERT INTO dead_letter
			(consumer, message_id, type, key, payload, headers, reason, error, attempts)
		VALUES ($1, $2, $3, $4, $5, jsonb_build_object($2::text, $2::text), $6, $7, 3)`
	var errs []error
	exec := func(sql string, args ...any) {
		_, err := s.db.Exec(ctx, sql, args...)
		errs = append(errs, err)
	}
	for i, text := range corpus {
		exec(letterSQL, text, text, text, text, []byte(text), []string{"permanent", "no_id", "exhausted"}[i%3], text)
		exec(`INSERT INTO operation (id, caller, idempotency_key, method, request, request_hash, identity, signature)
			VALUES (outbox_uuidv7(), $1, '', $1, '', '', '', '')`, text)
		exec(`INSERT INTO operator_audit (action, target, reason, actor, detail) VALUES ($1, $1, $1, $1, $1)`, text)
		exec(`INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
			VALUES ($1, $1, $1, $1, '', '{}', 3, now() + interval '1 hour', $1)`, text)
		errs = append(errs, send(ctx, s.db, text, text))
	}
	const plain = "0190c0de-0000-7000-8000-000000000001"
	const text = "google.protobuf.StringValue"
	exec(letterSQL, "shipping", plain, text, "plain", []byte("\x0a\x0ca plain text"),
		"permanent", "the address is incomplete")
	for i := range 3 {
		id, key := fmt.Sprintf("0190c0de-0000-7000-8000-00000000010%d", i), fmt.Sprintf("customer-%d", i)
		exec(letterSQL, "billing", id, text, key, []byte("\x0a\x07order 7"),
			"exhausted", "the bank does not answer: context deadline exceeded")
	}
	exec(`INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
		SELECT 'shipping', gen_random_uuid()::text, 'google.protobuf.StringValue', 'blocked-key', '', '{}',
			4, now() + interval '1 hour', 'the warehouse does not answer'
		FROM generate_series(1, 3)`)
	return errors.Join(errs...)
}
