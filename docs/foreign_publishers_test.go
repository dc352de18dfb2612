package docs

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/rabbit"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// message matches a request to the management API, and the outcome that the page shows for it.
var message = regexp.MustCompile("(?ms)^```json message\n(.*?)^```$\n\n```text\n(.*?)\n```$")

// The examples of docs/foreign-publishers.md have the outcomes that the page shows.
func TestTheExamplesForForeignPublishers(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("foreign-publishers.md")
	if err != nil {
		t.Fatal(err)
	}
	amqpURL := testenv.AMQP(t)
	outcomes := startGroup(t, testenv.Postgres(t), amqpURL)
	examples := message.FindAllStringSubmatch(string(text), -1)
	for _, example := range examples {
		body, want := example[1], example[2]
		publish(t, amqpURL, body)
		select {
		case got := <-outcomes:
			if !strings.HasPrefix(got, want) {
				t.Errorf("%s: got\n%s\nwant\n%s", body, got, want)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("no outcome within 30 s of\n%s", body)
		}
	}
	if len(examples) < 6 {
		t.Errorf("only %d examples found", len(examples))
	}
}

const lettersSQL = `
SELECT count(*), coalesce((array_agg(reason || ': ' || error ORDER BY id DESC))[1], '') FROM dead_letter`

// startGroup runs a consumer group for texts until the test ends. It sends the outcome of each message.
func startGroup(t *testing.T, db *pgxpool.Pool, amqpURL string) (outcomes chan string) {
	t.Helper()
	outcomes = make(chan string, 100)
	outcome, letters := "", 0
	group := inbox.NewGroup("foreign")
	inbox.Handle(group, func(context.Context, pgx.Tx, *wrapperspb.StringValue) error {
		outcome = "applied"
		return nil
	})
	box := inbox.New(db, group, inbox.Config{})
	topology := rabbit.Topology{Exchange: "events", Queues: []rabbit.Queue{{Name: "foreign", Types: group.Types()}}}
	if err := topology.Declare(t.Context(), amqpURL); err != nil {
		t.Fatal(err)
	}
	config := rabbit.ConsumerConfig{URL: amqpURL, Topology: topology, Queue: "foreign", Batch: 1}
	consumer := rabbit.NewConsumer(config, func(ctx context.Context, batch []messaging.Delivery) error {
		outcome = "absorbed"
		if err := box.Process(ctx, batch); err != nil {
			return err
		}
		var kept int
		var text string
		err := db.QueryRow(ctx, lettersSQL).Scan(&kept, &text)
		if err == nil && kept > letters {
			outcome, letters = text, kept
		}
		outcomes <- outcome
		return err
	})
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- consumer.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return outcomes
}

// publish publishes a request of the page through the management API.
func publish(t *testing.T, amqpURL, body string) {
	t.Helper()
	broker, err := url.Parse(amqpURL)
	if err != nil {
		t.Fatal(err)
	}
	address := testenv.Management(t, amqpURL).URL() + "/api/exchanges" + broker.Path + "/events/publish"
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, address, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	request.Close = true
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil || !strings.Contains(string(answer), `"routed":true`) {
		t.Fatalf("%s\nreturned %s, %s (%v)", body, response.Status, answer, err)
	}
}
