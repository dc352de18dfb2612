//go:build unix

package localstack

import (
	"net"
	"testing"
	"time"
)

// RabbitMQ replaces a dead port mapper with a daemon. It must not keep running, although
// it is not recorded.
func TestStrayEPMDIsStopped(t *testing.T) {
	programs := findPrograms()
	if programs.epmd == "" {
		t.Fatal("no epmd: the other tests of this package install it")
	}
	port, err := freePort(0)
	if err != nil {
		t.Fatal(err)
	}
	inst := &instance{profile: profiles["test"], dir: t.TempDir()}
	start, err := inst.lockStart(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer start.unlock()
	inst.state.EPMD = port
	stray := &rabbitmq{instance: inst, programs: programs}
	stray.state.Data = t.TempDir()
	if err := makeOwn(stray.home()); err != nil {
		t.Fatal(err)
	}
	if err := stray.startEPMD(t.Context()); err != nil {
		t.Fatalf("start epmd: %v", err)
	}
	p, _ := inst.recorded(epmdName)
	t.Cleanup(func() { _ = p.stop(stopAtOnce) })

	// Register a node, which keeps the port mapper running.
	node, err := net.Dial("tcp", loopback(port))
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	alive := []byte{0, 17, 120, 0x4e, 0x20, 77, 0, 0, 6, 0, 5, 0, 4, 'n', 'o', 'd', 'e', 0, 0}
	if _, err := node.Write(alive); err != nil {
		t.Fatal(err)
	}
	if _, err := node.Read(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	if err := stopStrayEPMD(port); err != nil {
		t.Fatalf("stop: %v", err)
	}
	if !p.alive() {
		t.Error("the port mapper was stopped while it had a node")
	}
	node.Close()
	if err := stopStrayEPMD(port); err != nil {
		t.Fatalf("stop: %v", err)
	}
	if !waitGone(p, 5*time.Second) {
		t.Error("the port mapper still runs")
	}
}
