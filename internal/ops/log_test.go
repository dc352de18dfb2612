package ops

import (
	"encoding/binary"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestFindInLog(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	f := &fixture{Pool: db}
	fresh, old := messaging.New("k", wrapperspb.String("fresh")), messaging.New("k", wrapperspb.String("old"))
	var created [8]byte // an old time, like that of a redriven message
	binary.BigEndian.PutUint64(created[:], uint64(time.Now().Add(-outbox.MaxAge+time.Hour).UnixMilli()))
	copy(old.ID[:6], created[2:])
	err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
		return outbox.Insert(t.Context(), tx, fresh, old)
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, message := range []messaging.Message{fresh, old} {
		for _, delivered := range []bool{false, true} {
			found, err := FindInLog(t.Context(), db, message.ID)
			if err != nil || len(found) != 1 {
				t.Fatalf("found %+v, %v", found, err)
			}
			if m := found[0]; m.ID != message.ID || m.Delivered != delivered || m.TransactionID == 0 {
				t.Errorf("found %+v, want delivered %t", m, delivered)
			}
			f.exec(t, `UPDATE outbox_cursor SET delivered = pg_current_snapshot()`)
		}
		f.exec(t, `UPDATE outbox_cursor SET delivered = '1:1:'`)
	}
	unknown := messaging.New("", wrapperspb.String(""))
	if found, err := FindInLog(t.Context(), db, unknown.ID); err != nil || len(found) != 0 {
		t.Errorf("found %v, %v", found, err)
	}
}
