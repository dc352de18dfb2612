//go:build unix

package localstack

import (
	"errors"
	"math/rand/v2"
	"net"
	"strconv"
)

// The ports are below the range that Linux and macOS use for outgoing connections. A
// port in that range may be free now and the local end of a connection when the server
// binds it a second later.
const (
	firstPort = 20000
	lastPort  = 32000
)

// freePort returns the wanted port if it is free, else another one. A port that stays
// the same over restarts keeps the URLs of clients valid.
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

// loopback returns the address of a port on this machine.
func loopback(port int) string {
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
}
