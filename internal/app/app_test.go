package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
	"example.com/shop/internal/telemetry"
	amqp "github.com/rabbitmq/amqp091-go"
)

func TestMain(m *testing.M) {
	slog.SetDefault(telemetry.NewLogger(io.MultiWriter(os.Stderr, &logged), "text", slog.LevelDebug))
	testenv.Main(m)
}

// serve runs a process until the test ends, and returns a function that gets the status of its /readyz.
func serve(t *testing.T, run func(context.Context, Config) error, config Config) (ready func() int) {
	t.Helper()
	return start(t, run, config).ready
}

// started is a process that runs until the test ends or stops it.
type started struct {
	url, ops string // URLs for callers, and of the operators' port
	stop     func()
}

// ready returns the status of /readyz, 0 if there is no response.
func (s *started) ready() int {
	response, err := web.Get(s.ops + "/readyz")
	if err != nil {
		return 0
	}
	defer response.Body.Close()
	return response.StatusCode
}

// start runs a process until the test ends or stops it.
func start(t *testing.T, run func(context.Context, Config) error, config Config) *started {
	t.Helper()
	config.Addr, config.OpsAddr = testenv.FreeAddress(t), testenv.FreeAddress(t)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := run(ctx, config); err != nil {
			t.Error(err)
		}
	})
	stop := func() { cancel(); running.Wait() }
	t.Cleanup(stop)
	return &started{url: "http://" + config.Addr, ops: "http://" + config.OpsAddr, stop: stop}
}

func await(t *testing.T, what string, ready func() int, want int) {
	t.Helper()
	testenv.Eventually(t, 20*time.Second, func() error {
		if got := ready(); got != want {
			return fmt.Errorf("%s: status of /readyz is %d, want %d", what, got, want)
		}
		return nil
	})
}

// tested is a process under test.
type tested struct {
	run         func(context.Context, Config) error
	needsBroker bool
	takesCalls  bool // and has no other part
}

// processes also contains those that the tests of features add.
var processes = map[string]tested{
	"API": {run: RunAPI, takesCalls: true}, "Relay": {run: RunRelay, needsBroker: true},
	"Consumer": {run: RunConsumer, needsBroker: true}, "All": {run: RunAll, needsBroker: true},
}

// Each process is ready while its servers are available. All need the database.
func TestReadiness(t *testing.T) {
	t.Parallel()
	for name, process := range processes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			database, postgresURL := testenv.ProxyURL(t, testenv.PostgresURL(t))
			broker, amqpURL := testenv.ProxyURL(t, testenv.AMQP(t))
			ready := serve(t, process.run, probed(Config{PostgresURL: postgresURL, AMQPURL: amqpURL}))
			await(t, "at first", ready, http.StatusOK)

			broker.Refuse(true)
			broker.Cut()
			if process.needsBroker {
				await(t, "without the broker", ready, http.StatusServiceUnavailable)
			} else if got := ready(); got != http.StatusOK {
				t.Errorf("status is %d without the broker, which the process does not need", got)
			}
			broker.Refuse(false)
			await(t, "with the broker back", ready, http.StatusOK)

			database.Refuse(true)
			database.Cut()
			await(t, "without the database", ready, http.StatusServiceUnavailable)
			database.Refuse(false)
			await(t, "with the database back", ready, http.StatusOK)
		})
	}
}

// A message whose headers the client library cannot read becomes a malformed dead letter, and the others are applied.
func TestUnreadableMessagesAreKept(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	config := probed(Config{PostgresURL: db.Config().ConnString(), AMQPURL: testenv.AMQP(t)})
	effects := effectsIn(t, db)
	await(t, "consumer", serve(t, RunConsumer, config), http.StatusOK)
	await(t, "relay", serve(t, RunRelay, config), http.StatusOK)
	if err := send(t.Context(), db, "key", "first"); err != nil {
		t.Fatal(err)
	}
	effects(1) // now the exchange and the queues exist
	conn, err := amqp.Dial(config.AMQPURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	channel, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	long := make([]any, 9000)
	for i := range long {
		long[i] = ""
	}
	for i := range 10 {
		if err := send(t.Context(), db, "key", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
		unreadable := amqp.Publishing{
			MessageId: fmt.Sprint("unreadable ", i), Body: []byte("kept"), Headers: amqp.Table{"x": long},
		}
		if err := channel.Publish(config.Exchange, "google.protobuf.StringValue", true, false, unreadable); err != nil {
			t.Fatal(err)
		}
	}
	effects(11)
	testenv.Eventually(t, 20*time.Second, func() error {
		var n int
		err := db.QueryRow(t.Context(), `
			SELECT count(*) FROM dead_letter
			WHERE reason = 'malformed' AND payload = 'kept' AND error LIKE '%more than 8192 elements%'`).Scan(&n)
		if err == nil && n != 10 {
			err = fmt.Errorf("%d dead letters, want 10", n)
		}
		return err
	})
	state, ok := testenv.Management(t, config.AMQPURL).Queue(rabbit.DeadQueue(probeQueue))
	if !ok || state.Messages > 0 {
		t.Errorf("state of the dead queue is %+v", state)
	}
}

// A message that the broker gave up on becomes a dead letter.
func TestUndeliveredMessagesAreKept(t *testing.T) {
	t.Parallel()
	config := probed(Config{PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t)})
	await(t, "consumer", serve(t, RunConsumer, config), http.StatusOK)
	conn, err := amqp.Dial(config.AMQPURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	testenv.Eventually(t, 20*time.Second, func() error {
		channel, err := conn.Channel() // errors close a channel
		if err != nil {
			return err
		}
		queue := rabbit.DeadQueue(probeQueue)
		_, err = channel.QueueDeclarePassive(queue, true, false, false, false, nil)
		if err != nil {
			return err
		}
		message := amqp.Publishing{MessageId: "given up", Type: "type", Body: []byte("\x00\xff"), Headers: amqp.Table{
			"x-death": []any{amqp.Table{"reason": "delivery_limit", "count": int64(1), "queue": probeQueue}},
		}}
		// Wait for the confirm: a queue that has just been declared may have no leader yet, and drop the message.
		if err := channel.Confirm(false); err != nil {
			return err
		}
		confirm, err := channel.PublishWithDeferredConfirmWithContext(t.Context(), "", queue, true, false, message)
		if err != nil {
			return err
		}
		waiting, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		if acked, err := confirm.WaitContext(waiting); err != nil || !acked {
			return fmt.Errorf("acked %t, %v", acked, err)
		}
		return nil
	})
	db, err := postgres.Open(t.Context(), postgres.Config{URL: config.PostgresURL})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	testenv.Eventually(t, 20*time.Second, func() error {
		filter := deadletter.Filter{Consumer: probeGroup, Reason: deadletter.Undelivered}
		letters, err := deadletter.List(t.Context(), db, filter, 0, 10)
		if err == nil && len(letters) != 1 {
			err = fmt.Errorf("%d dead letters, want 1", len(letters))
		}
		if err != nil {
			return err
		}
		letter, _, err := deadletter.Get(t.Context(), db, letters[0].ID)
		if err == nil && (string(letter.Payload) != "\x00\xff" || !strings.Contains(letter.Error, "delivery_limit")) {
			t.Errorf("got %+v", letter)
		}
		return err
	})
}

func TestAnAddressThatIsTakenEndsTheProcess(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	config := probed(Config{PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t)})
	address := listener.Addr().String()
	for name, addresses := range map[string]struct{ api, ops string }{
		"API": {address, ""}, "operators": {"127.0.0.1:0", address},
	} {
		config := config
		config.Addr, config.OpsAddr = addresses.api, addresses.ops
		done := make(chan error, 1)
		go func() { done <- RunAll(t.Context(), config) }()
		select {
		case err := <-done:
			var taken *net.OpError
			if !errors.As(err, &taken) {
				t.Errorf("%s: error is %v", name, err)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("%s: the process is still running", name)
		}
	}
}
