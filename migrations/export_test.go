package migrations

import (
	"context"
	"io/fs"

	"github.com/jackc/pgx/v5/pgxpool"
)

// UpFrom is Up of a binary with other migrations.
var UpFrom = up

// CheckFrom is Check of a binary with other migrations.
func CheckFrom(ctx context.Context, db *pgxpool.Pool, files fs.FS) error {
	sets, err := load(files)
	if err == nil {
		_, err = compare(ctx, db, sets)
	}
	return err
}
