package ops

import (
	"context"
	"errors"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestSetShardsWaitsForOpenWriters(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	tx, err := db.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := outbox.Insert(t.Context(), tx, messaging.New("k", wrapperspb.String("m"))); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second) // 1 s for the lock, the rest for a connection
	defer cancel()
	if err := SetShards(ctx, db, 2); !errors.Is(err, ErrBusy) {
		t.Fatalf("error is %v", err)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := SetShards(t.Context(), db, 2); err != nil {
		t.Fatal(err)
	}
	shards, err := Shards(t.Context(), db)
	if err != nil || len(shards) != 3 {
		t.Fatalf("%+v, %v", shards, err)
	}
	if shards[0].Backlog != 1 || !shards[0].Retired || shards[1].Backlog != 0 || shards[2].Retired {
		t.Errorf("shards: %+v", shards)
	}
}

func TestSetShardsRejectsInvalidNumbers(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	for _, n := range []int{0, -1, MaxShards + 1} {
		if err := SetShards(t.Context(), db, n); err == nil {
			t.Errorf("%d shards were accepted", n)
		}
	}
}

func TestEnsureShards(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	for _, step := range []struct {
		shards  int
		changed bool
	}{{1, false}, {3, true}, {3, false}, {1, true}} {
		changed, err := EnsureShards(t.Context(), db, step.shards)
		if err != nil || changed != step.changed {
			t.Errorf("%d shards: changed %t, %v", step.shards, changed, err)
		}
		const sql = `SELECT count(*) FROM outbox_cursor WHERE NOT drained AND NOT retired`
		var n int
		if err := db.QueryRow(t.Context(), sql).Scan(&n); err != nil || n != step.shards {
			t.Errorf("%d shards, %v, want %d", n, err, step.shards)
		}
	}
}

func TestRepairOfAHealthyOutbox(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	if _, err := Repair(t.Context(), db); !errors.Is(err, ErrNoRepairNeeded) {
		t.Errorf("error is %v", err)
	}
	if _, err := db.Exec(t.Context(), `UPDATE outbox_cursor SET system_identifier = 1`); err != nil {
		t.Fatal(err)
	}
	if native, err := isNative(t.Context(), db); err != nil || native {
		t.Errorf("native %t, %v", native, err)
	}
	if undelivered, err := Repair(t.Context(), db); err != nil || undelivered != 0 {
		t.Errorf("%d undelivered, %v", undelivered, err)
	}
}
