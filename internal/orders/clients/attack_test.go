package clients

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"example.com/shop/internal/auth"
	"example.com/shop/internal/bounds"
	"example.com/shop/internal/dev/testenv"
)

const (
	procedure = "/orders.v1.OrderService/PlaceOrder"
	largest   = 4 << 20 // of a message
)

// pod is the API as a process of its own, with the memory that its manifest grants.
type pod struct {
	t         *testing.T
	pid       int
	addr, ops string
	keys      []string // of callers
	limit     int      // bytes
}

// fromManifests returns a number that the manifests state.
func fromManifests(t *testing.T, file, pattern string) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "deploy", "kubernetes", "base", file))
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(pattern).FindSubmatch(text)
	if found == nil {
		t.Fatalf("%s states no %s", file, pattern)
	}
	n, err := strconv.Atoi(string(found[1]))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func startPod(t *testing.T) *pod {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "api")
	build := exec.Command("go", "build", "-o", binary, "./cmd/shop")
	build.Dir = root
	if output, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	p := &pod{t: t, addr: testenv.FreeAddress(t), ops: testenv.FreeAddress(t), limit: fromManifests(t, "api.yaml", `limits: \{memory: (\d+)Mi\}`) << 20}
	var lines []string
	for i := range 8 {
		key, line, err := auth.NewKey(fmt.Sprint("caller-", i), []string{"customer"})
		if err != nil {
			t.Fatal(err)
		}
		p.keys, lines = append(p.keys, key), append(lines, line)
	}
	command := exec.Command("sh", "-c", `[ -z "$GROUP" ] || echo $$ >"$GROUP/cgroup.procs"; exec "$0" api`, binary)
	command.Env = []string{
		"LISTEN=" + p.addr, "OPS_LISTEN=" + p.ops, "POSTGRES_URL=" + testenv.As(t, testenv.PostgresURL(t), "shop_api"),
		"API_KEYS=" + strings.Join(lines, " "), "HTTP_MAX_CONNS=" + strconv.Itoa(fromManifests(t, "kustomization.yaml", `HTTP_MAX_CONNS=(\d+)`)),
		"GROUP=" + p.memoryGroup(),
	}
	if slices.Contains(command.Env, "GROUP=") { // no right to make one: the process is told its limit, and its peak is measured all the same
		command.Env = append(command.Env, fmt.Sprint("GOMEMLIMIT=", p.limit/10*9))
	}
	var log bytes.Buffer
	command.Stdout, command.Stderr = &log, &log
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	p.pid = command.Process.Pid
	t.Cleanup(func() {
		_ = command.Process.Signal(syscall.SIGTERM) // it may have ended
		if err := command.Wait(); err != nil {
			t.Errorf("the API ended with %v\n%s", err, log.Bytes()[max(0, log.Len()-4000):])
		}
	})
	testenv.Eventually(t, 60*time.Second, func() error { return get(p.ops, "/readyz") })
	return p
}

// memoryGroup makes a control group that ends the process where a kubelet would, and returns its folder; "" if that is not allowed.
func (p *pod) memoryGroup() string {
	for hierarchy, file := range map[string]string{"/sys/fs/cgroup/memory": "memory.limit_in_bytes", "/sys/fs/cgroup": "memory.max"} {
		group := filepath.Join(hierarchy, "pod-"+strconv.Itoa(os.Getpid()))
		if os.Mkdir(group, 0o755) != nil {
			continue
		}
		p.t.Cleanup(func() { _ = os.Remove(group) }) // after the process
		if os.WriteFile(filepath.Join(group, file), []byte(strconv.Itoa(p.limit)), 0o644) == nil {
			return group
		}
	}
	return ""
}

// get returns an error unless a path is answered with 200.
func get(addr, path string) error {
	response, err := probes.Get("http://" + addr + path)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	return nil
}

var probes = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}

// peak is the most memory that the process had, in bytes.
func (p *pod) peak() int {
	p.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
	if err != nil {
		p.t.Fatalf("the API is gone: %v", err)
	}
	found := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status)
	if found == nil {
		p.t.Fatal("the API is gone")
	}
	kilobytes, err := strconv.Atoi(string(found[1]))
	if err != nil {
		p.t.Fatal(err)
	}
	return kilobytes << 10
}

// watch asks for health until stop is called, which returns the longest that an answer took.
func (p *pod) watch() (stop func() time.Duration) {
	ctx, cancel := context.WithCancel(context.Background())
	slowest := make(chan time.Duration, 1)
	go func() {
		var most time.Duration
		for ctx.Err() == nil {
			began := time.Now()
			if err := get(p.ops, "/healthz"); err != nil {
				p.t.Errorf("/healthz: %v", err)
				break
			}
			most = max(most, time.Since(began))
			select {
			case <-ctx.Done():
			case <-time.After(20 * time.Millisecond):
			}
		}
		slowest <- most
	}()
	return func() time.Duration { cancel(); return <-slowest }
}

// A pod with the limits of its manifest survives all that callers send at once: connections, bodies that never end, bombs, and the largest wrong
// requests. Its probes are answered meanwhile, and afterwards it serves.
func TestAPodSurvivesItsCallers(t *testing.T) {
	t.Parallel()
	p := startPod(t)
	for _, attack := range []struct {
		name string
		run  func(*pod)
	}{{"connections", (*pod).connect}, {"held bodies", (*pod).hold}, {"bombs", (*pod).bomb}, {"wrong requests", (*pod).err}} {
		stop := p.watch()
		attack.run(p)
		t.Logf("%-15s peak %3d of %d MiB, /healthz in %v at most", attack.name, p.peak()>>20, p.limit>>20, stop())
	}
	if peak := p.peak(); peak > p.limit {
		t.Errorf("the API had %d MiB, its limit is %d", peak>>20, p.limit>>20)
	}
	status := p.post(p.keys[0], "application/json", "", []byte(`{"orderId":"0190c0de-0000-7000-8000-000000000001","customerId":"ann","lines":[{"sku":"apple","quantity":1}]}`))
	if status != http.StatusOK {
		t.Errorf("afterwards an order is answered with %d", status)
	}
}

// each runs fn n times, many at once.
func each(n, atOnce int, fn func(i int)) {
	var running sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	for i := range n {
		slots <- struct{}{}
		running.Go(func() { fn(i); <-slots })
	}
	running.Wait()
}

// connect opens 10,000 connections from many addresses, and keeps those that it gets.
func (p *pod) connect() {
	var mu sync.Mutex
	var open []net.Conn
	each(10_000, 200, func(i int) {
		from := &net.TCPAddr{IP: net.IPv4(127, 0, byte(1+i%50), byte(1+i%200))}
		conn, err := (&net.Dialer{LocalAddr: from, Timeout: time.Second}).Dial("tcp", p.addr)
		if err == nil {
			mu.Lock()
			open = append(open, conn)
			mu.Unlock()
		}
	})
	p.t.Logf("%d connections are open", len(open))
	for _, conn := range open {
		conn.Close()
	}
}

// hold sends bodies of which the last byte is missing: as many as all callers may have calls.
func (p *pod) hold() {
	head := "POST " + procedure + " HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/proto\r\nContent-Length: " + strconv.Itoa(largest) + "\r\n"
	body := bytes.Repeat([]byte{0x1a, 0}, largest/2)[1:]
	var mu sync.Mutex
	var open []net.Conn
	each(400, 400, func(i int) {
		conn, err := net.Dial("tcp", p.addr)
		if err != nil {
			return
		}
		mu.Lock()
		open = append(open, conn)
		mu.Unlock()
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		_, _ = io.WriteString(conn, head+"X-Api-Key: "+p.keys[i%len(p.keys)]+"\r\n\r\n")
		_, _ = conn.Write(body) // what is refused is closed
	})
	for _, conn := range open {
		conn.Close()
	}
}

// bomb sends gzip that inflates to the largest message, and to more.
func (p *pod) bomb() {
	pack := func(n int) []byte {
		var packed bytes.Buffer
		zip := gzip.NewWriter(&packed)
		_, _ = zip.Write(bytes.Repeat([]byte{0x1a, 0}, n/2)) // to memory
		_ = zip.Close()
		return packed.Bytes()
	}
	bombs := [][]byte{pack(largest), pack(2 * bounds.MaxFields), pack(200 << 20)}
	each(600, 100, func(i int) { p.post(p.keys[i%len(p.keys)], "application/proto", "gzip", bombs[i%len(bombs)]) })
}

// err sends the largest wrong requests.
func (p *pod) err() {
	empty := bytes.Repeat([]byte{0x1a, 0}, largest/2)
	bodies := []struct {
		kind string
		body []byte
	}{
		{"application/proto", empty}, {"application/proto", empty[:2*bounds.MaxFields]},
		{"application/json", []byte(`{"lines":[{}` + strings.Repeat(",{}", largest/3-10) + `]}`)},
		{"application/json", []byte(`{"lines":[{}` + strings.Repeat(",{}", bounds.MaxFields/2-10) + `]}`)},
		{"application/json", []byte(`{"customerId":"` + strings.Repeat("ä", largest/2-20) + `"}`)},
		{"application/json", bytes.Repeat([]byte("["), largest)},
	}
	each(600, 100, func(i int) {
		one := bodies[i%len(bodies)]
		p.post(p.keys[i%len(p.keys)], one.kind, "", one.body)
	})
}

var callers = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}, Timeout: time.Minute}

// post makes a call and returns the status of its answer, 0 for none.
func (p *pod) post(key, contentType, encoding string, body []byte) int {
	request, err := http.NewRequest(http.MethodPost, "http://"+p.addr+procedure, bytes.NewReader(body))
	if err != nil {
		p.t.Error(err)
		return 0
	}
	request.Header.Set("Content-Type", contentType)
	request.Header.Set("X-Api-Key", key)
	if encoding != "" {
		request.Header.Set("Content-Encoding", encoding)
	}
	response, err := callers.Do(request)
	if err != nil {
		return 0 // cut off
	}
	defer response.Body.Close()
	_, _ = io.Copy(io.Discard, response.Body) // cut off
	return response.StatusCode
}
