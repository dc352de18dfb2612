//go:build unix

package localstack

import (
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// stopRabbitMQ stops the node and then its port mapper, to which a node that shuts
// down in order says goodbye.
func (i *instance) stopRabbitMQ() error {
	_, own := i.recorded(epmdName)
	errs := []error{i.halt(rabbitmqName, i.profile.rabbitmqStop()), i.halt(epmdName, stopAtOnce)}
	if !own && i.state.EPMD != 0 {
		errs = append(errs, stopStrayEPMD(i.state.EPMD))
	}
	return errors.Join(errs...)
}

// stopStrayEPMD stops a port mapper that is on no record. RabbitMQ looks every minute
// whether its port mapper still lives, and starts a daemon in its place if not.
//
// It is asked through its protocol, with the KILL_REQ that `epmd -kill` sends (see
// "EPMD Protocol" in the Erlang documentation). It refuses while any node is
// registered with it, so this cannot harm another node whose port mapper has come to
// listen on this port.
func stopStrayEPMD(port int) error {
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	// It takes a moment to notice that its node is gone, and refuses until then.
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); <-ticker.C {
		conn, err := net.DialTimeout("tcp", loopback(port), time.Second)
		if err != nil {
			return nil // nobody there: the usual case, or done
		}
		if err := askToEnd(conn); err != nil {
			return fmt.Errorf("stop epmd: %w", err)
		}
	}
	return nil // not ours to stop; the next start takes another port
}

func askToEnd(conn net.Conn) error {
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte{0, 1, 'k'}); err != nil {
		return err
	}
	// It answers OK or NO and closes. Which one shows at the next connection.
	_, _ = io.Copy(io.Discard, conn)
	return nil
}
