package chaos

import (
	"bytes"
	"fmt"
	"strconv"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// TestBadMessages: a message that the broker does not accept neither stops the others nor causes them to be sent
// repeatedly.
func TestBadMessages(t *testing.T) {
	t.Parallel()
	binary := buildVictim(t)
	inflate := map[string]string{"inflate": strconv.Itoa(testenv.Oversized(t))} // see victim
	for name, bad := range map[string]struct {
		body    proto.Message
		headers map[string]string
		reason  string
	}{
		"NoQueueWantsTheType":   {wrapperspb.Bytes([]byte("nobody handles bytes")), nil, "unroutable"},
		"TooLargeForThisBroker": {wrapperspb.String("this and more"), inflate, "refused"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStage(t, binary)
			message := messaging.New("", bad.body)
			message.Headers = bad.headers
			for i := range messages {
				s.insert(t, i)
				if i == messages/2 {
					err := postgres.Transact(t.Context(), s.db, func(tx pgx.Tx) error {
						return outbox.Insert(t.Context(), tx, message)
					})
					if err != nil {
						t.Fatal(err)
					}
				}
			}
			s.start(t, "relay")
			s.start(t, "consumer")
			s.awaitEffects(t, messages)
			s.awaitCursor(t, messages, 1)
			var id, reason string
			var payload []byte
			err := s.db.QueryRow(t.Context(), `
				SELECT message_id, reason, payload FROM dead_letter`).Scan(&id, &reason, &payload)
			if err != nil || id != message.ID.String() || reason != bad.reason ||
				!bytes.Equal(payload, message.Payload) {
				t.Errorf("dead letter %s, %s, %d bytes, %v", id, reason, len(payload), err)
			}
			var copies int // two by the relay, and one more if the broker redelivers
			err = s.db.QueryRow(t.Context(), `SELECT max(copies) FROM inbox`).Scan(&copies)
			if err != nil || copies > 3 {
				t.Errorf("a message was sent %d times (%v)", copies, err)
			}
			s.check(t, messages, id)
		})
	}
}

// awaitCursor waits until the relay has recorded these numbers of messages.
func (s *stage) awaitCursor(t *testing.T, published, parked int) {
	t.Helper()
	testenv.Eventually(t, 20*time.Second, func() error {
		var gotPublished, gotParked int
		err := s.db.QueryRow(t.Context(), `SELECT published, parked FROM outbox_cursor`).Scan(&gotPublished, &gotParked)
		if err == nil && (gotPublished != published || gotParked != parked) {
			err = fmt.Errorf("%d published and %d parked, want %d and %d", gotPublished, gotParked, published, parked)
		}
		return err
	})
}

// TestBrokerDisturbed disconnects the broker from running processes.
func TestBrokerDisturbed(t *testing.T) {
	t.Parallel()
	binary := buildVictim(t)
	for name, disturb := range map[string]func(proxy *testenv.TCPProxy){
		"ConnectionsCut": func(proxy *testenv.TCPProxy) { proxy.Cut() },
		"ConnectionsRefusedForAWhile": func(proxy *testenv.TCPProxy) {
			proxy.Refuse(true)
			proxy.Cut()
			proxy.Refuse(false)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStage(t, binary)
			proxy, url := testenv.ProxyURL(t, s.amqpURL)
			s.amqpURL = url
			s.start(t, "relay")
			s.start(t, "consumer")
			for i := range messages {
				s.insert(t, i)
				if i%40 == 20 {
					disturb(proxy)
				}
			}
			s.awaitEffects(t, messages)
			s.check(t, messages)
		})
	}
}

// TestExchangeDeleted: the relay declares the exchange again and continues. It parks, and does not lose, messages that
// no queue is bound for meanwhile.
func TestExchangeDeleted(t *testing.T) {
	t.Parallel()
	s := newStage(t, buildVictim(t))
	s.start(t, "relay")
	s.start(t, "consumer")
	for i := range messages {
		s.insert(t, i)
		if i == messages/2 {
			s.awaitEffects(t, i) // the exchange then exists
			testenv.Management(t, s.amqpURL).DeleteExchange("events")
		}
	}
	testenv.Eventually(t, 60*time.Second, func() error {
		var effects, dead int
		err := s.db.QueryRow(t.Context(), `
			SELECT (SELECT count(DISTINCT message) FROM effects),
				(SELECT count(DISTINCT message_id) FROM dead_letter)`).Scan(&effects, &dead)
		if err == nil && effects+dead != messages {
			err = fmt.Errorf("%d effects and %d dead letters of %d messages", effects, dead, messages)
		}
		return err
	})
}
