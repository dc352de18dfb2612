package ops

import (
	"strings"
	"testing"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/operations"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// The message of a durable call continues only if the call has no result yet. A call that has ended is not executed
// again.
func TestRedriveOfDurableCalls(t *testing.T) {
	t.Parallel()
	const insertSQL = `
		INSERT INTO operation (id, caller, idempotency_key, method, request, request_hash, identity, signature,
			state, response, error, ended_at)
		SELECT $1, 'ann', '', 'm', '', '', '', '', $2, CASE $2 WHEN 'succeeded' THEN ''::bytea END,
			CASE WHEN $2 IN ('failed', 'cancelled') THEN ''::bytea END,
			CASE WHEN $2 IN ('succeeded', 'failed', 'cancelled') THEN now() END
		WHERE $2 <> 'deleted'`
	for state, want := range map[string]string{
		"pending": "redriven", "running": "redriven", "succeeded": "duplicate",
		"failed": "ended as failed", "cancelled": "ended as cancelled", "deleted": "unknown or was deleted",
	} {
		for _, consumer := range []string{"", operations.Consumer} {
			t.Run(state+" of "+consumer, func(t *testing.T) {
				t.Parallel()
				f := newFixture(t)
				id := uuid.Must(uuid.NewV7())
				f.exec(t, insertSQL, id, state)
				letter := deadletter.Letter{
					Consumer: consumer, MessageID: id.String(), Type: operations.MessageType, Reason: deadletter.Exhausted,
				}
				err := postgres.Transact(t.Context(), f.Pool, func(tx pgx.Tx) error {
					return deadletter.Insert(t.Context(), tx, letter)
				})
				if err != nil {
					t.Fatal(err)
				}
				selection := all
				selection.Groups = append(selection.Groups, Group{
					Name: operations.Consumer, Types: []string{operations.MessageType}, Ended: operations.Ended,
				})
				got := f.redrive(t, selection)
				if len(got) != 1 || !strings.Contains(got[0], want) {
					t.Errorf("got %q, want %q", got, want)
				}
				sent := "0"
				if want == "redriven" {
					sent = "1"
				}
				f.want(t, "sent", `
					SELECT ((SELECT count(*) FROM outbox) + (SELECT count(*) FROM inbox_retry))::text`, sent)
				if strings.HasPrefix(got[0], "refused") {
					discarded := collect(t, func(each func(Outcome)) error {
						return Discard(t.Context(), f.Pool, selection, each)
					})
					equal(t, "outcomes of the discard", discarded, "discarded")
				}
			})
		}
	}
}
