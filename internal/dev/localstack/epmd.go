//go:build unix

package localstack

import (
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// stopRabbitMQ stops the node and then its port mapper, because a node that shuts down
// cleanly unregisters from the port mapper.
func (i *instance) stopRabbitMQ() error {
	_, own := i.recorded(epmdName)
	errs := []error{i.halt(rabbitmqName, i.profile.rabbitmqStop()), i.halt(epmdName, stopAtOnce)}
	if !own && i.state.EPMD != 0 {
		errs = append(errs, stopStrayEPMD(i.state.EPMD))
	}
	return errors.Join(errs...)
}

// stopStrayEPMD stops a port mapper that is not recorded. RabbitMQ checks every minute
// that its port mapper runs, and starts a daemon in its place if not.
//
// It sends the KILL_REQ that `epmd -kill` sends (see "EPMD Protocol" in the Erlang
// documentation). A port mapper refuses that request while any node is registered, so
// this cannot harm another node whose port mapper now listens on this port.
func stopStrayEPMD(port int) error {
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	// The port mapper refuses until it notices, after a moment, that its node has ended.
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); <-ticker.C {
		conn, err := net.DialTimeout("tcp", loopback(port), time.Second)
		if err != nil {
			return nil // nothing listens: the usual case, or it has ended
		}
		if err := requestKill(conn); err != nil {
			return fmt.Errorf("stop epmd: %w", err)
		}
	}
	return nil // not ours to stop; the next start takes another port
}

func requestKill(conn net.Conn) error {
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte{0, 1, 'k'}); err != nil {
		return err
	}
	// It answers OK or NO and closes. The next connection shows which.
	_, _ = io.Copy(io.Discard, conn)
	return nil
}
