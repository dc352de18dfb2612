//go:build unix

package testenv_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"

	"example.com/shop/internal/dev/testenv"
)

func TestPostgres(t *testing.T) {
	t.Parallel()

	t.Run("IsMigrated", func(t *testing.T) {
		t.Parallel()
		pool := testenv.Postgres(t)
		if version := query[int](t, pool, `SELECT max(version_id)::int FROM goose_core_version`); version < 1 {
			t.Errorf("got version %d, want a migrated database", version)
		}
	})

	t.Run("IsTheTestsOwn", func(t *testing.T) {
		t.Parallel()
		names := make(chan string, 2)
		t.Run("Parallel", func(t *testing.T) {
			for range 2 {
				t.Run("Test", func(t *testing.T) {
					t.Parallel()
					pool := testenv.Postgres(t)
					if _, err := pool.Exec(t.Context(), `CREATE TABLE mine ()`); err != nil {
						t.Errorf("create table: %v", err)
					}
					names <- query[string](t, pool, `SELECT current_database()`)
				})
			}
		})
		first, second := <-names, <-names
		if first == second {
			t.Fatalf("both tests got %s", first)
		}
		left := query[int](t, testenv.Postgres(t),
			`SELECT count(*)::int FROM pg_database WHERE datname IN ($1, $2)`, first, second)
		if left != 0 {
			t.Errorf("%d databases are left after their tests", left)
		}
	})

	t.Run("IsDroppedWhileConnected", func(t *testing.T) {
		t.Parallel()
		var outliving *pgxpool.Pool
		t.Run("Test", func(t *testing.T) {
			var err error
			if outliving, err = pgxpool.New(t.Context(), testenv.PostgresURL(t)); err != nil {
				t.Fatalf("open pool: %v", err)
			}
			query[int](t, outliving, `SELECT 1`)
		})
		defer outliving.Close()
		if err := outliving.Ping(t.Context()); err == nil {
			t.Error("the database still answers")
		}
	})
}

func TestAMQP(t *testing.T) {
	t.Parallel()
	first, second := testenv.AMQP(t), testenv.AMQP(t)
	const queue = "q"

	ch := dial(t, first)
	declare(t, ch, queue)
	publish(t, ch, queue, "hello")

	// The queue exists only in its own vhost.
	_, err := dial(t, second).QueueDeclarePassive(queue, false, false, false, false, nil)
	if !isCode(err, amqp.NotFound) {
		t.Errorf("got %v in the other vhost, want not found", err)
	}

	client := testenv.Management(t, first)
	testenv.Eventually(t, 10*time.Second, func() error {
		if got, ok := client.Queue(queue); !ok || got.Messages != 1 {
			return fmt.Errorf("queue is %+v", got)
		}
		return nil
	})
	messages := client.Get(queue, 10)
	if len(messages) != 1 || messages[0].Payload != "hello" || messages[0].Properties.MessageID != "1" {
		t.Errorf("got %+v", messages)
	}
	publish(t, ch, queue, "again")
	client.Purge(queue)
	if messages := client.Get(queue, 10); len(messages) != 0 {
		t.Errorf("got %+v after a purge", messages)
	}
	client.DeleteQueue(queue)
	if _, ok := client.Queue(queue); ok {
		t.Error("the queue still exists")
	}
}

func TestCloseConnections(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	closed := dial(t, url).NotifyClose(make(chan *amqp.Error, 1))
	testenv.Management(t, url).CloseConnections()
	if err := <-closed; err == nil || err.Code != amqp.ConnectionForced {
		t.Errorf("got %v, want connection forced", err)
	}
}

func TestDeleteExchange(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	ch := dial(t, url)
	if err := ch.ExchangeDeclare("x", "fanout", true, false, false, false, nil); err != nil {
		t.Fatalf("declare exchange: %v", err)
	}
	testenv.Management(t, url).DeleteExchange("x")
	if err := ch.ExchangeDeclarePassive("x", "fanout", true, false, false, false, nil); !isCode(err, amqp.NotFound) {
		t.Errorf("got %v, want not found", err)
	}
}

func dial(t *testing.T, url string) *amqp.Channel {
	t.Helper()
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil && !errors.Is(err, amqp.ErrClosed) {
			t.Errorf("close connection: %v", err)
		}
	})
	ch, err := conn.Channel()
	if err != nil {
		t.Fatalf("open channel: %v", err)
	}
	return ch
}

func declare(t *testing.T, ch *amqp.Channel, queue string) {
	t.Helper()
	if _, err := ch.QueueDeclare(queue, true, false, false, false, nil); err != nil {
		t.Fatalf("declare queue: %v", err)
	}
	if err := ch.Confirm(false); err != nil {
		t.Fatalf("turn on confirms: %v", err)
	}
}

func publish(t *testing.T, ch *amqp.Channel, queue, body string) {
	t.Helper()
	confirmation, err := ch.PublishWithDeferredConfirmWithContext(t.Context(), "", queue, true, false,
		amqp.Publishing{MessageId: "1", Body: []byte(body)})
	if err != nil {
		t.Fatalf("publish: %v", err)
	}
	if acked, err := confirmation.WaitContext(t.Context()); !acked || err != nil {
		t.Fatalf("wait for confirm: acked %t, %v", acked, err)
	}
}

func isCode(err error, code int) bool {
	var failure *amqp.Error
	return errors.As(err, &failure) && failure.Code == code
}

func query[T any](t *testing.T, pool *pgxpool.Pool, sql string, args ...any) (value T) {
	t.Helper()
	if err := pool.QueryRow(t.Context(), sql, args...).Scan(&value); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return value
}
