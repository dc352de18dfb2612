package rpcserver_test

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rpcserver"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
)

// post sends JSON with headers to the unary method.
func post(t *testing.T, server *running, header http.Header, body io.Reader) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.url+unarySpec.Procedure, body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = header.Clone()
	if req.Header == nil {
		req.Header = http.Header{}
	}
	if req.Header.Get("Content-Type") == "" {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := httpClient(t, false).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { res.Body.Close() })
	return res
}

// cpu returns the CPU time of this process.
func cpu(t *testing.T) time.Duration {
	t.Helper()
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		t.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// bomb returns that many MiB of zeros, compressed. It repeats one compressed MiB, because the race detector makes
// compression very slow.
func bomb(t *testing.T, mebibytes int) []byte {
	t.Helper()
	var header, block bytes.Buffer
	if err := gzip.NewWriter(&header).Flush(); err != nil {
		t.Fatal(err)
	}
	w, err := flate.NewWriter(&block, flate.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, 1<<20)); err != nil || w.Flush() != nil {
		t.Fatal(err)
	}
	return append(header.Bytes(), bytes.Repeat(block.Bytes(), mebibytes)...)
}

// TestBombs does not run in parallel because it measures the CPU time of the process.
func TestBombs(t *testing.T) {
	server := serve(t, rpcserver.Config{}, unary(echo))
	var empty bytes.Buffer
	if err := gzip.NewWriter(&empty).Close(); err != nil {
		t.Fatal(err)
	}
	for name, body := range map[string][]byte{
		"2000 MiB of zeros":    bomb(t, 2000), // takes 9 s to inflate under the race detector
		"4 MiB of empty gzips": bytes.Repeat(empty.Bytes(), 4<<20/empty.Len()),
		"deeply nested JSON":   bytes.Repeat([]byte("["), 4<<20),
	} {
		header := http.Header{"Content-Encoding": {"gzip"}}
		if body[0] == '[' {
			header = nil
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		started, used := time.Now(), cpu(t)
		res := post(t, server, header, bytes.NewReader(body))
		text, _ := io.ReadAll(res.Body)
		used, took := cpu(t)-used, time.Since(started)
		runtime.ReadMemStats(&after)
		allocated := (after.TotalAlloc - before.TotalAlloc) >> 20
		t.Logf("%s (%d bytes sent): %s of CPU, %s, %d MiB allocated, %s %s",
			name, len(body), used, took, allocated, res.Status, text)
		if res.StatusCode/100 != 4 {
			t.Errorf("%s: %s", name, res.Status)
		}
		// It costs 20 ms and 16 MiB without the race detector, and up to 0.7 s with it.
		if used > 3*time.Second || allocated > 64 {
			t.Errorf("%s: cost %s and %d MiB", name, used, allocated)
		}
	}
}

func TestRequestsHaveIDs(t *testing.T) {
	t.Parallel()
	server := serve(t, rpcserver.Config{}, unary(func(ctx context.Context, _ string) (string, error) {
		return rpcserver.RequestID(ctx), nil
	}))
	for given, kept := range map[string]bool{
		"abc-123_X.9": true, strings.Repeat("a", 64): true,
		"": false, strings.Repeat("a", 65): false, "a b": false, `a" code=ok`: false, "é": false,
	} {
		res := post(t, server, http.Header{"X-Request-Id": {given}}, strings.NewReader(`""`))
		body, _ := io.ReadAll(res.Body)
		id := res.Header.Get("X-Request-Id")
		if string(body) != `"`+id+`"` || (id == given) != kept || len(res.Header["X-Request-Id"]) != 1 || len(id) < 11 {
			t.Errorf("sent %q: handler saw %s, response has %q", given, body, res.Header["X-Request-Id"])
		}
		if !strings.Contains(server.logs.String(), "request_id="+id) {
			t.Errorf("sent %q: log lacks %s", given, id)
		}
	}
	res, err := httpClient(t, false).Get(server.url + "/nowhere")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusNotFound || res.Header.Get("X-Request-Id") == "" {
		t.Errorf("request outside of RPCs: got %s, ID %q", res.Status, res.Header.Get("X-Request-Id"))
	}
}

func TestLogHasNoPayloadAndNoCredential(t *testing.T) {
	t.Parallel()
	server := serve(t, rpcserver.Config{Interceptors: []connect.ServerInterceptor{auth.Identify(auth.Config{Off: true})}},
		unary(func(_ context.Context, in string) (string, error) {
			if strings.Contains(in, "fail") {
				return "", errors.New("broken\ninjected msg=x")
			}
			return in, nil
		}))
	for _, in := range []string{`"hunter2"`, `"hunter2 fail"`, `{"hunter2":`, `hunter2`} {
		post(t, server, http.Header{"Authorization": {"Bearer hunter2"}, "X-Api-Key": {"hunter2"}},
			strings.NewReader(in))
	}
	log := server.logs.String()
	if strings.Contains(log, "hunter2") {
		t.Errorf("the log contains secrets:\n%s", log)
	}
	line := regexp.MustCompile(`msg=rpc procedure=\S+ code=\S+ duration=\S+ protocol=connect peer=\S+ ` +
		`caller=development request_id=\S+\n`)
	if n := len(line.FindAllString(log, -1)); n != 4 {
		t.Errorf("4 calls have %d lines in the access log:\n%s", n, log)
	}
	if strings.Contains(log, "\ninjected") {
		t.Errorf("an error injected a log line:\n%s", log)
	}
}

func TestSecurityHeaders(t *testing.T) {
	t.Parallel()
	server := serve(t, rpcserver.Config{}, unary(echo))
	want := map[string]string{
		"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
		"Content-Security-Policy":      "default-src 'none'; frame-ancestors 'none'",
		"Cross-Origin-Resource-Policy": "same-origin",
		"Strict-Transport-Security":    "", "Server": "", "Access-Control-Allow-Origin": "",
	}
	for _, body := range []string{`"hello"`, `bad`} {
		res := post(t, server, http.Header{"Origin": {server.url}}, strings.NewReader(body))
		for name, value := range want {
			if got := strings.Join(res.Header.Values(name), ", "); got != value {
				t.Errorf("%s: %s is %q, want %q", res.Status, name, got, value)
			}
		}
	}
}

func TestOrigins(t *testing.T) {
	t.Parallel()
	const console = "https://console.example"
	open := serve(t, rpcserver.Config{Origins: []string{console}}, unary(echo))
	closed := serve(t, rpcserver.Config{}, unary(echo))
	send := func(server *running, method string, header http.Header) *http.Response {
		t.Helper()
		body := strings.NewReader(`"hello"`)
		req, err := http.NewRequestWithContext(t.Context(), method, server.url+unarySpec.Procedure, body)
		if err != nil {
			t.Fatal(err)
		}
		req.Header = header
		req.Header.Set("Content-Type", "application/json")
		res, err := httpClient(t, false).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		return res
	}
	for name, test := range map[string]struct {
		server  *running
		origin  string
		allowed bool
	}{
		"configured":      {open, console, true},
		"another":         {open, "https://evil.example", false},
		"http":            {open, "http://console.example", false},
		"suffix":          {open, "https://evil.console.example", false},
		"prefix":          {open, console + ".evil.example", false},
		"null":            {open, "null", false},
		"none configured": {closed, console, false},
	} {
		preflight := send(test.server, http.MethodOptions, http.Header{
			"Origin": {test.origin}, "Access-Control-Request-Method": {"POST"},
			"Access-Control-Request-Headers": {"authorization,connect-protocol-version,content-type,x-api-key"},
		})
		if got := preflight.Header.Get("Access-Control-Allow-Origin"); (got == test.origin) != test.allowed ||
			got == "*" {
			t.Errorf("%s: preflight allows %q", name, got)
		}
		if got := preflight.Header.Get("Access-Control-Allow-Headers"); test.allowed &&
			!strings.Contains(got, "x-api-key") {
			t.Errorf("%s: preflight allows headers %q", name, got)
		}
		if preflight.Header.Get("Access-Control-Allow-Credentials") != "" {
			t.Errorf("%s: cookies are allowed", name)
		}
		call := send(test.server, http.MethodPost, http.Header{"Origin": {test.origin},
			"Sec-Fetch-Site": {"cross-site"}})
		origin := call.Header.Get("Access-Control-Allow-Origin")
		if (call.StatusCode == http.StatusOK) != test.allowed || (origin == test.origin) != test.allowed {
			t.Errorf("%s: call returned %s and allows %q", name, call.Status, origin)
		}
		exposed := call.Header.Get("Access-Control-Expose-Headers")
		if test.allowed && !strings.Contains(strings.ToLower(exposed), "grpc-status") {
			t.Errorf("%s: exposes %q", name, exposed)
		}
	}
	own := http.Header{"Sec-Fetch-Site": {"same-origin"}, "Origin": {closed.url}}
	if res := send(closed, http.MethodPost, own); res.StatusCode != http.StatusOK {
		t.Errorf("page of the server's own origin: %s", res.Status)
	}
	for origin, good := range map[string]bool{
		console: true, "http://localhost:5173": true,

		"*": false, "console.example": false, console + "/": false, "null": false, "": false,
	} {
		if err := rpcserver.CheckOrigin(origin); (err == nil) != good {
			t.Errorf("%q: got error %v", origin, err)
		}
	}
}

func TestLimitsReturnARetryHint(t *testing.T) {
	t.Parallel()
	key, line, err := auth.NewKey("ann", []string{"customer"})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := auth.ParseKeys(line)
	if err != nil {
		t.Fatal(err)
	}
	server := serve(t, rpcserver.Config{Interceptors: []connect.ServerInterceptor{
		auth.Identify(auth.Config{Keys: keys}), rpcserver.Limit(rpcserver.LimitConfig{Rate: 0.01, Burst: 2}),
	}}, unary(echo))
	for _, transport := range transports[:2] {
		client := server.client(t, transport.http2, transport.options...)
		for range 2 {
			if _, err := call(t.Context(), client, ""); err != nil {
				break // the second transport finds the bucket empty
			}
		}
		ctx, info := connect.NewClientContext(t.Context())
		_, err := call(ctx, client, "")
		var limited *connect.Error
		if !errors.As(err, &limited) || limited.Code() != connect.CodeResourceExhausted || len(limited.Details()) != 1 {
			t.Fatalf("%s: got %v", transport.name, err)
		}
		detail, err := connectproto.UnmarshalErrorDetail(limited.Details()[0])
		if err != nil {
			t.Fatal(err)
		}
		wait := detail.(*errdetails.RetryInfo).GetRetryDelay().AsDuration()
		if wait < 90*time.Second || wait > 100*time.Second {
			t.Errorf("%s: got retry delay %s, want 90 s to 100 s", transport.name, wait)
		}
		if after := info.ResponseHeader().Get("Retry-After"); after != "100" {
			t.Errorf("%s: retry-after is %q", transport.name, after)
		}
	}
	res := post(t, server, http.Header{"X-Api-Key": {key}, "X-Forwarded-For": {"192.0.2.1"}}, strings.NewReader(`""`))
	if res.StatusCode != http.StatusOK {
		t.Errorf("an authenticated caller pays for the unauthenticated callers of its address: %s", res.Status)
	}
	res = post(t, server, http.Header{"X-Forwarded-For": {"192.0.2.1"}}, strings.NewReader(`""`))
	if res.StatusCode != http.StatusTooManyRequests {
		t.Errorf("a header changes the account that pays: %s", res.Status)
	}
}

func TestStreamsCountAsConcurrent(t *testing.T) {
	t.Parallel()
	begun := make(chan struct{}, 2)
	limit := rpcserver.Limit(rpcserver.LimitConfig{Concurrent: 2})
	server := serve(t, rpcserver.Config{Interceptors: []connect.ServerInterceptor{limit}},
		unary(echo), stream(func(ctx context.Context, _ string, send func(string) error) error {
			begun <- struct{}{}
			<-ctx.Done()
			return ctx.Err()
		}))
	client := server.client(t, true)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range 2 {
		go func() { _, _ = receiveAll(ctx, client, "") }()
	}
	for range 2 { // wait before the unary call, which could take the place of a stream
		select {
		case <-begun:
		case <-time.After(10 * time.Second):
			t.Fatal("a stream did not begin")
		}
	}
	if _, err := call(t.Context(), client, ""); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("got error %v, want %s", err, connect.CodeResourceExhausted)
	}
	cancel()
	testenv.Eventually(t, 10*time.Second, func() error {
		_, err := call(t.Context(), client, "")
		return err
	})
}

func TestLargeHeadersAreRefused(t *testing.T) {
	t.Parallel()
	server := serve(t, rpcserver.Config{MaxHeaderBytes: 8 << 10}, unary(echo))
	for size, good := range map[int]bool{4 << 10: true, 32 << 10: false} {
		res := post(t, server, http.Header{"X-Large": {strings.Repeat("x", size)}}, strings.NewReader(`""`))
		if (res.StatusCode == http.StatusOK) != good {
			t.Errorf("%d bytes: %s", size, res.Status)
		}
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	t.Parallel()
	server := serve(t, rpcserver.Config{MaxConns: 2, MaxConnsPerAddress: -1, ReadHeaderTimeout: time.Second},
		unary(echo))
	var idle []net.Conn
	for range 10 { // the kernel accepts all of them, the server two at a time
		conn, err := net.Dial("tcp", server.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		idle = append(idle, conn)
	}
	// The server cuts off silent connections, so that the connections behind them are served.
	started := time.Now()
	if res := post(t, server, nil, strings.NewReader(`""`)); res.StatusCode != http.StatusOK {
		t.Errorf("got %s", res.Status)
	}
	if took := time.Since(started); took < time.Second || took > 15*time.Second {
		t.Errorf("behind %d silent connections, a call took %s", len(idle), took)
	}
}

func TestCallerThatDoesNotReadIsCutOff(t *testing.T) {
	t.Parallel()
	ended := make(chan struct{})
	var once sync.Once
	server := serve(t, rpcserver.Config{WriteTimeout: 200 * time.Millisecond},
		stream(func(ctx context.Context, _ string, send func(string) error) error {
			defer once.Do(func() { close(ended) })
			for ctx.Err() == nil {
				if err := send(strings.Repeat("x", 1<<20)); err != nil {
					return err
				}
			}
			return ctx.Err()
		}))
	conn, err := net.Dial("tcp", server.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	message := []byte(`""`)
	body := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
	const request = "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/connect+json\r\nContent-Length: " +
		"%d\r\n\r\n%s"
	fmt.Fprintf(conn, request, streamSpec.Procedure, len(body), body)
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("the handler still waits for the caller to read")
	}
}

// TestRapidReset tests CVE-2023-44487: streams that are opened and reset at once.
func TestRapidReset(t *testing.T) {
	t.Parallel()
	const streams = 20
	var mu sync.Mutex
	running, most := 0, 0
	config := rpcserver.Config{MaxConcurrentStreams: streams}
	server := serve(t, config, unary(func(context.Context, string) (string, error) {
		mu.Lock()
		running++
		most = max(most, running)
		mu.Unlock()
		time.Sleep(20 * time.Millisecond) // work that ignores its context
		mu.Lock()
		running--
		mu.Unlock()
		return "", nil
	}))
	conn, err := net.Dial("tcp", server.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	framer := http2.NewFramer(conn, conn)
	go func() { _, _ = io.Copy(io.Discard, conn) }()
	_ = framer.WriteSettings()
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for i := range 3000 {
		block.Reset()
		for _, field := range [][2]string{
			{":method", "POST"}, {":scheme", "http"}, {":authority", "x"}, {":path", unarySpec.Procedure},
			{"content-type", "application/json"},
		} {
			_ = encoder.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]})
		}
		id := uint32(2*i + 1)
		err := errors.Join(
			framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block.Bytes(), EndHeaders: true}),
			framer.WriteData(id, true, []byte(`""`)),
			framer.WriteRSTStream(id, http2.ErrCodeCancel))
		if err != nil {
			break // the server has closed the connection
		}
	}
	if out, err := call(t.Context(), server.client(t, true), ""); err != nil || out != "" {
		t.Errorf("another caller: got %q, %v", out, err)
	}
	mu.Lock()
	defer mu.Unlock()
	if most > streams+1 || most == 0 {
		t.Errorf("%d handlers ran at once for one connection with %d streams", most, streams)
	}
}

func TestPanicOutsideOfCallsIsAnError(t *testing.T) {
	t.Parallel()
	var logs logs
	server := rpcserver.New(rpcserver.Config{Log: logs.logger()})
	server.Handle("GET /panics", http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("secret") }))
	ctx, stop := context.WithCancel(t.Context())
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, listener) }()
	code, body := get(t, "http://"+listener.Addr().String()+"/panics")
	if code != http.StatusInternalServerError || strings.Contains(body, "secret") {
		t.Errorf("got %d %s", code, body)
	}
	if !strings.Contains(logs.String(), "request panicked") {
		t.Errorf("log is %s", logs.String())
	}
	stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
