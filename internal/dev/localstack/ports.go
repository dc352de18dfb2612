//go:build unix

package localstack

import (
	"errors"
	"math/rand/v2"
	"net"
	"strconv"
)

// Ports are taken from below the range that Linux and macOS use for outgoing
// connections. A port from that range could be free now and be the local end of
// somebody's connection when the server wants it a second later.
const (
	firstPort = 20000
	lastPort  = 32000
)

// freePort returns the wanted port if it is free, else another one. Keeping a port
// over restarts lets clients that were given a URL find the server again.
func freePort(wanted int, taken ...int) (int, error) {
	if wanted != 0 && portFree(wanted) {
		return wanted, nil
	}
next:
	for range 1000 {
		port := firstPort + rand.IntN(lastPort-firstPort)
		for _, other := range taken {
			if port == other {
				continue next
			}
		}
		if portFree(port) {
			return port, nil
		}
	}
	return 0, errors.New("find a free port: 1000 attempts failed")
}

func portFree(port int) bool {
	listener, err := net.Listen("tcp", loopback(port))
	if err != nil {
		return false
	}
	listener.Close()
	return true
}

// loopback is the address of a port on this machine.
func loopback(port int) string {
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
}
