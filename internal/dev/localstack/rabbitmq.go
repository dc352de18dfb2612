//go:build unix

package localstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	rabbitmqName = "rabbitmq"
	epmdName     = "epmd"

	// rabbitmqUser is the default user and its password. RabbitMQ accepts it only over
	// the loopback interface.
	rabbitmqUser = "guest"
)

// rabbitmq is the RabbitMQ of an instance, with its own Erlang port mapper (epmd). A
// node without one starts a shared port mapper, which outlives it and which nobody
// stops.
type rabbitmq struct {
	*instance
	programs programs
	account  *account
}

// brokerURL returns the URL of a listener of the node, with credentials.
func brokerURL(scheme string, port int) string {
	return fmt.Sprintf("%[1]s://%[2]s:%[2]s@%[3]s", scheme, rabbitmqUser, loopback(port))
}

func (r *rabbitmq) running(ctx context.Context) bool {
	// Ignore its port mapper, which no client needs.
	if _, alive := r.recorded(rabbitmqName); !alive {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, answerPatience)
	defer cancel()
	return r.answers(ctx) == nil
}

// start stops an old node and starts a new one that answers.
func (r *rabbitmq) start(ctx context.Context) error {
	if err := r.stopRabbitMQ(); err != nil {
		return err
	}
	if r.profile.throwaway {
		if err := os.RemoveAll(r.home()); err != nil {
			return fmt.Errorf("remove old data: %w", err)
		}
	}
	if err := os.MkdirAll(r.home(), 0o700); err != nil {
		return fmt.Errorf("make data folder: %w", err)
	}
	if err := r.account.own(r.home()); err != nil {
		return fmt.Errorf("make data folder: %w", err)
	}
	return r.boot(ctx, rabbitmqName, r.attempt)
}

func (r *rabbitmq) home() string            { return filepath.Join(r.state.Data, "rabbitmq") }
func (r *rabbitmq) file(name string) string { return filepath.Join(r.home(), name) }

func (r *rabbitmq) attempt(ctx context.Context) error {
	s := &r.state
	if err := r.setPorts(&s.AMQP, &s.Management, &s.Distribution, &s.EPMD); err != nil {
		return err
	}
	if err := r.configure(); err != nil {
		return err
	}
	err := r.startEPMD(ctx)
	if err == nil {
		err = r.startNode(ctx)
	}
	if err != nil {
		return errors.Join(err, r.stopRabbitMQ())
	}
	return nil
}

// configure writes the node's files.
func (r *rabbitmq) configure() error {
	config := fmt.Sprintf(`listeners.tcp.1 = %s
management.tcp.ip = 127.0.0.1
management.tcp.port = %d
# Absolute and small: the default suits a server, but on a developer's nearly full
# disk it would block every publisher.
disk_free_limit.absolute = 50MB
# Tests read counts from the management API. The age of a count is at most the
# interval of the queues' reports (ms) plus the interval of their collection, which
# is the smallest interval (s) of the policy. The defaults of both are 5 s.
collect_statistics_interval = 1000
management.sample_retention_policies.global.minute = 1
management.sample_retention_policies.basic.minute = 1
management.sample_retention_policies.detailed.minute = 1
`, loopback(r.state.AMQP), r.state.Management)
	if r.profile.throwaway {
		// Below our own limit of a message, so that a test can make the broker refuse one.
		config += "max_message_size = 524288\n"
	}
	for name, content := range map[string]string{
		"rabbitmq.conf":   config,
		"enabled_plugins": "[rabbitmq_management].\n",
	} {
		if err := os.WriteFile(r.file(name), []byte(content), 0o600); err != nil {
			return fmt.Errorf("configure rabbitmq: %w", err)
		}
		if err := r.account.own(r.file(name)); err != nil {
			return fmt.Errorf("configure rabbitmq: %w", err)
		}
	}
	return nil
}

func (r *rabbitmq) startEPMD(ctx context.Context) error {
	port := strconv.Itoa(r.state.EPMD)
	epmd, err := r.spawn(command{
		name:    epmdName,
		argv:    []string{r.programs.epmd, "-port", port, "-address", "127.0.0.1"},
		env:     serverEnv(r.home()),
		dir:     r.home(),
		account: r.account,
	})
	if err != nil {
		return err
	}
	// Wait, because a node that finds no epmd starts a daemon that nobody stops.
	return waitFor(ctx, epmd, 10*time.Second, func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", loopback(r.state.EPMD))
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

func (r *rabbitmq) startNode(ctx context.Context) error {
	node, err := r.spawn(command{
		name:    rabbitmqName,
		argv:    []string{r.programs.rabbitmqServer},
		env:     r.env(),
		dir:     r.home(),
		account: r.account,
	})
	if err != nil {
		return err
	}
	return waitFor(ctx, node, bootPatience, r.answers)
}

func (r *rabbitmq) env() []string {
	return serverEnv(r.home(),
		"RABBITMQ_NODENAME=stack@localhost",
		"RABBITMQ_CONFIG_FILE="+r.file("rabbitmq.conf"),
		"RABBITMQ_CONF_ENV_FILE=/dev/null", // not the one in /etc
		"RABBITMQ_MNESIA_BASE="+r.file("mnesia"),
		"RABBITMQ_LOG_BASE="+r.file("log"),
		"RABBITMQ_LOGS=-", // standard output is our log
		"RABBITMQ_ENABLED_PLUGINS_FILE="+r.file("enabled_plugins"),
		"RABBITMQ_PID_FILE="+r.file("pid"),
		"RABBITMQ_DIST_PORT="+strconv.Itoa(r.state.Distribution),
		"ERL_EPMD_PORT="+strconv.Itoa(r.state.EPMD),
		"ERL_EPMD_ADDRESS=127.0.0.1",
		"ERL_CRASH_DUMP="+r.file("erl_crash.dump"),
		// This makes the start script exec the Erlang VM instead of staying its parent,
		// so that the recorded pid is the server's.
		"RUNNING_UNDER_SYSTEMD=true",
		// No busy waiting: idle schedulers would occupy cores that the tests need.
		"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=+sbwt none +sbwtdcpu none +sbwtdio none"+
			" -kernel inet_dist_use_interface {127,0,0,1}",
	)
}

// answers checks both listeners that clients use. They start independently, so one
// proves nothing about the other.
func (r *rabbitmq) answers(ctx context.Context) error {
	if err := r.managementAnswers(ctx); err != nil {
		return err
	}
	dialer := net.Dialer{Timeout: answerPatience}
	conn, err := amqp.DialConfig(brokerURL("amqp", r.state.AMQP), amqp.Config{
		Dial: func(network, addr string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return conn, conn.SetDeadline(time.Now().Add(answerPatience)) // of the handshake; the client resets it
		},
	})
	if err != nil {
		return fmt.Errorf("reach rabbitmq: %w", err)
	}
	return conn.CloseDeadline(time.Now().Add(answerPatience))
}

func (r *rabbitmq) managementAnswers(ctx context.Context) error {
	address := brokerURL("http", r.state.Management) + "/api/vhosts"
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	// The tests would report an idle connection as a leaked goroutine.
	request.Close = true
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return fmt.Errorf("reach rabbitmq management: %w", err)
	}
	defer response.Body.Close()
	_, _ = io.Copy(io.Discard, response.Body)
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("reach rabbitmq management: %s", response.Status)
	}
	return nil
}
