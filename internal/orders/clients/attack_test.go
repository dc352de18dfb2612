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

// pod is a separate API process with the memory limit of its manifest.
type pod struct {
	t         *testing.T
	pid       int
	addr, ops string
	keys      []string // of callers
	limit     int      // bytes
	grouped   bool     // in a control group that enforces the limit
}

// fromManifests returns a number from the manifests.
func fromManifests(t *testing.T, file, pattern string) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "deploy", "kubernetes", "base", file))
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(pattern).FindSubmatch(text)
	if found == nil {
		t.Fatalf("%s does not match %s", file, pattern)
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
	p := &pod{
		t: t, addr: testenv.FreeAddress(t), ops: testenv.FreeAddress(t),
		limit: fromManifests(t, "api.yaml", `limits: \{memory: (\d+)Mi\}`) << 20,
	}
	maxConns := fromManifests(t, "kustomization.yaml", `HTTP_MAX_CONNS=(\d+)`)
	var lines []string
	for i := range 8 {
		key, line, err := auth.NewKey(fmt.Sprint("caller-", i), []string{"customer"})
		if err != nil {
			t.Fatal(err)
		}
		p.keys, lines = append(p.keys, key), append(lines, line)
	}
	command := exec.Command("sh", "-c", `[ -z "$GROUP" ] || echo $$ >"$GROUP/cgroup.procs" && exec "$0" api`, binary)
	command.Env = []string{
		"LISTEN=" + p.addr, "OPS_LISTEN=" + p.ops, "POSTGRES_URL=" + testenv.As(t, testenv.PostgresURL(t), "shop_api"),
		"API_KEYS=" + strings.Join(lines, " "), "HTTP_MAX_CONNS=" + strconv.Itoa(maxConns),
		"GROUP=" + p.memoryGroup(),
	}
	if p.grouped = !slices.Contains(command.Env, "GROUP="); !p.grouped {
		// Without permission to create a control group, pass the limit to the process. The test still measures its peak.
		command.Env = append(command.Env, fmt.Sprint("GOMEMLIMIT=", p.limit/10*8))
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

// memoryGroup creates a control group that kills the process at the limit, as under a kubelet, and returns its folder.
// It returns "" without permission to create one.
func (p *pod) memoryGroup() string {
	for hierarchy, file := range map[string]string{
		"/sys/fs/cgroup/memory": "memory.limit_in_bytes", "/sys/fs/cgroup": "memory.max",
	} {
		group := filepath.Join(hierarchy, "pod-"+strconv.Itoa(os.Getpid()))
		if os.Mkdir(group, 0o755) != nil {
			continue
		}
		p.t.Cleanup(func() { _ = os.Remove(group) }) // runs after the process has ended
		// Only the kernel puts files into a new folder. In an ordinary file system, os.WriteFile would create the file.
		limit, err := os.OpenFile(filepath.Join(group, file), os.O_WRONLY, 0)
		if err != nil {
			continue
		}
		defer limit.Close()
		if _, err := limit.WriteString(strconv.Itoa(p.limit)); err == nil {
			return group
		}
	}
	return ""
}

// get returns an error unless the response to a GET request has status 200.
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

// peak returns the peak memory of the process, in bytes.
func (p *pod) peak() int {
	p.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
	if err != nil {
		p.t.Fatalf("the API process has ended: %v", err)
	}
	found := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status)
	if found == nil {
		p.t.Fatal("the API process has ended")
	}
	kilobytes, err := strconv.Atoi(string(found[1]))
	if err != nil {
		p.t.Fatal(err)
	}
	return kilobytes << 10
}

// watch polls the health probe until stop is called, which returns the longest response time.
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

// A pod with the limits of its manifest survives many callers at once that send connections, bodies that never end,
// compression bombs, and the largest invalid requests. Meanwhile it answers probes, and afterwards it serves calls.
func TestAPodSurvivesItsCallers(t *testing.T) {
	t.Parallel()
	p := startPod(t)
	for _, attack := range []string{"connections", "unfinished bodies", "bombs", "invalid requests"} {
		stop := p.watch()
		p.attack(attack)
		t.Logf("%-17s peak %3d of %d MiB, /healthz in %v at most", attack, p.peak()>>20, p.limit>>20, stop())
	}
	// In a control group, the process would have ended at the limit. Its peak also has pages of files, which other groups
	// may pay for.
	if peak := p.peak(); peak > p.limit && !p.grouped {
		t.Errorf("the API used %d MiB, its limit is %d", peak>>20, p.limit>>20)
	}
	const order = `{"orderId":"0190c0de-0000-7000-8000-000000000001","customerId":"ann",` +
		`"lines":[{"sku":"apple","quantity":1}]}`
	caller := &attacker{p.addr, p.keys}
	if status := caller.post(p.keys[0], "application/json", "", []byte(order)); status != http.StatusOK {
		t.Errorf("afterwards PlaceOrder returns status %d", status)
	}
}

// attacks contains the attacks, by name.
var attacks = map[string]func(*attacker){
	"connections": (*attacker).connect, "unfinished bodies": (*attacker).stall, "bombs": (*attacker).bomb,
	"invalid requests": (*attacker).err,
}

// attacker calls the API with these keys.
type attacker struct {
	addr string
	keys []string
}

// attack runs an attack in a process of its own with low priority: the callers of a pod do not use its processor.
func (p *pod) attack(name string) {
	p.t.Helper()
	command := exec.Command("nice", "-n", "19", os.Args[0])
	command.Env = append(os.Environ(), "ATTACK="+name, "TARGET="+p.addr, "KEYS="+strings.Join(p.keys, " "))
	output, err := command.CombinedOutput()
	if err != nil {
		p.t.Fatalf("%s: %v\n%s", name, err, output)
	}
	if len(output) > 0 {
		p.t.Logf("%s", output)
	}
}

// attacking runs the attack of this process, if it is one of attack's.
func attacking() bool {
	attack := attacks[os.Getenv("ATTACK")]
	if attack != nil {
		attack(&attacker{addr: os.Getenv("TARGET"), keys: strings.Fields(os.Getenv("KEYS"))})
	}
	return attack != nil
}

// each runs fn n times, at most atOnce calls at a time.
func each(n, atOnce int, fn func(i int)) {
	var running sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	for i := range n {
		slots <- struct{}{}
		running.Go(func() { fn(i); <-slots })
	}
	running.Wait()
}

// connect opens 10,000 connections from many addresses, and keeps open those that succeed.
func (a *attacker) connect() {
	var mu sync.Mutex
	var open []net.Conn
	each(10_000, 200, func(i int) {
		from := &net.TCPAddr{IP: net.IPv4(127, 0, byte(1+i%50), byte(1+i%200))}
		conn, err := (&net.Dialer{LocalAddr: from, Timeout: time.Second}).Dial("tcp", a.addr)
		if err == nil {
			mu.Lock()
			open = append(open, conn)
			mu.Unlock()
		}
	})
	fmt.Printf("%d connections open\n", len(open))
	for _, conn := range open {
		conn.Close()
	}
}

// stall sends request bodies without their last byte, as many as the callers together may have calls in progress.
func (a *attacker) stall() {
	head := "POST " + procedure + " HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/proto\r\n" +
		"Content-Length: " + strconv.Itoa(largest) + "\r\n"
	body := bytes.Repeat([]byte{0x1a, 0}, largest/2)[1:]
	var mu sync.Mutex
	var open []net.Conn
	each(400, 400, func(i int) {
		conn, err := net.Dial("tcp", a.addr)
		if err != nil {
			return
		}
		mu.Lock()
		open = append(open, conn)
		mu.Unlock()
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		_, _ = io.WriteString(conn, head+"X-Api-Key: "+a.keys[i%len(a.keys)]+"\r\n\r\n")
		_, _ = conn.Write(body) // the API closes connections of refused requests
	})
	for _, conn := range open {
		conn.Close()
	}
}

// bomb sends gzip bodies that inflate to the largest message, and to more.
func (a *attacker) bomb() {
	pack := func(n int) []byte {
		var packed bytes.Buffer
		zip := gzip.NewWriter(&packed)
		_, _ = zip.Write(bytes.Repeat([]byte{0x1a, 0}, n/2)) // to memory, so it cannot fail
		_ = zip.Close()
		return packed.Bytes()
	}
	bombs := [][]byte{pack(largest), pack(2 * bounds.MaxFields), pack(200 << 20)}
	each(600, 100, func(i int) { a.post(a.keys[i%len(a.keys)], "application/proto", "gzip", bombs[i%len(bombs)]) })
}

// err sends the largest invalid requests.
func (a *attacker) err() {
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
		request := bodies[i%len(bodies)]
		a.post(a.keys[i%len(a.keys)], request.kind, "", request.body)
	})
}

var callers = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}, Timeout: time.Minute}

// post makes a call and returns the status of the response, or 0 if there is none.
func (a *attacker) post(key, contentType, encoding string, body []byte) int {
	request, err := http.NewRequest(http.MethodPost, "http://"+a.addr+procedure, bytes.NewReader(body))
	if err != nil {
		panic(err)
	}
	request.Header.Set("Content-Type", contentType)
	request.Header.Set("X-Api-Key", key)
	if encoding != "" {
		request.Header.Set("Content-Encoding", encoding)
	}
	response, err := callers.Do(request)
	if err != nil {
		return 0 // the API closed the connection
	}
	defer response.Body.Close()
	_, _ = io.Copy(io.Discard, response.Body) // the API may close the connection
	return response.StatusCode
}
