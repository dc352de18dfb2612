package migrations

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/pressly/goose/v3"
)

// set is a numbered set of migrations with a version table of its own.
type set struct {
	// core marks the core's set. Its files never change once applied, and a lower number may be applied after a higher
	// one: a service may add a part of the core later.
	core   bool
	folder string // before the names of its files, "core/" or ""
	table  string
	fsys   fs.FS
	files  map[int64]file // by number
}

// file is a migration of this binary.
type file struct {
	name   string // with the folder
	sum    string // SHA-256 of its bytes, in hex
	breaks int64  // see mark; 0 without one
}

// embedded returns the sets of this binary.
var embedded = sync.OnceValues(func() ([]*set, error) { return load(FS) })

// load reads the sets, the core's first.
func load(files fs.FS) ([]*set, error) {
	core, err := fs.Sub(files, "core")
	if err != nil {
		return nil, fmt.Errorf("load migrations: %w", err)
	}
	sets := []*set{
		{core: true, folder: "core/", table: "goose_core_version", fsys: core},
		{table: "goose_db_version", fsys: files},
	}
	for _, s := range sets {
		if err := s.load(); err != nil {
			return nil, fmt.Errorf("load migrations: %w", err)
		}
	}
	return sets, nil
}

func (s *set) load() error {
	names, err := fs.Glob(s.fsys, "*.sql")
	if err != nil {
		return err
	}
	s.files = make(map[int64]file)
	for _, name := range names {
		number, err := goose.NumericComponent(name) // goose would skip other names
		if err != nil {
			return err
		}
		text, err := fs.ReadFile(s.fsys, name)
		if err != nil {
			return err
		}
		breaks, err := breaks(text, number)
		if err != nil {
			return fmt.Errorf("%s%s: %w", s.folder, name, err)
		}
		sum := sha256.Sum256(text)
		s.files[number] = file{name: s.folder + name, sum: hex.EncodeToString(sum[:]), breaks: breaks}
	}
	return nil
}

// mark matches the line "-- breaks: NNNN" of a migration, and lines that may be meant as one. The mark means that
// binaries whose newest migration of this set is older than NNNN cannot work with the schema once the migration is
// applied.
var mark = regexp.MustCompile(`(?mi)^--[ \t]*breaks\b.*$`)

// breaks returns the number in the mark of a migration, or 0 if it has no mark.
func breaks(text []byte, own int64) (int64, error) {
	found := mark.FindAllString(string(text), -1)
	if len(found) == 0 {
		return 0, nil
	}
	digits, _ := strings.CutPrefix(found[0], "-- breaks: ")
	number, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || len(found) > 1 || number < 1 || number > own {
		return 0, fmt.Errorf("%q: want one line \"-- breaks: NNNN\", with the number of this migration or an earlier one",
			found[0])
	}
	return number, nil
}

// newest returns the highest number of the set, 0 if it is empty.
func (s *set) newest() int64 {
	return slices.Max(append(slices.Collect(maps.Keys(s.files)), 0))
}

// Reasons of a Refusal.
var (
	// ErrNoSchema means that no migration was ever applied.
	ErrNoSchema = errors.New("there is no schema in this database")
	// ErrTooOld means that some migrations of this binary are not applied.
	ErrTooOld = errors.New("the schema is too old")
	// ErrTooNew means that an unknown migration is applied that breaks this binary.
	ErrTooNew = errors.New("the schema is too new")
	// ErrChanged means that a migration was applied that differs from the one of this binary with its number.
	ErrChanged = errors.New("the schema is another one")
	// ErrForeign means that the version table of another program is in the way.
	ErrForeign = errors.New("the schema is not this service's")
)

// Refusal is the error for a schema that does not fit this binary. Its text is one line: the problem and what helps.
type Refusal struct {
	// Reason is one of the errors above.
	Reason error
	// Detail names the migration; "" if there is none to name.
	Detail string
	// Cure says what helps.
	Cure string
}

func (r *Refusal) Error() string { return r.Problem() + ": " + r.Cure }

// Unwrap returns the reason.
func (r *Refusal) Unwrap() error { return r.Reason }

// Problem returns the reason with its detail.
func (r *Refusal) Problem() string {
	if r.Detail == "" {
		return r.Reason.Error()
	}
	return r.Reason.Error() + ": " + r.Detail
}

// IsFinal reports whether err is a Refusal that neither time nor Up changes: only another binary or another database
// helps.
func IsFinal(err error) bool {
	refusal := new(Refusal)
	return errors.As(err, &refusal) && refusal.Reason != ErrNoSchema && refusal.Reason != ErrTooOld
}

// Check returns nil if this binary can work with the schema of the database, and otherwise a Refusal or the error of a
// query. It can if all of its migrations are applied, those of the core with the same content, and if no unknown
// migration is applied that breaks this binary. Other unknown migrations belong to a newer version and are fine: old
// processes continue with a newer schema.
func Check(ctx context.Context, db *pgxpool.Pool) error {
	sets, err := embedded()
	if err != nil {
		return err
	}
	_, err = compare(ctx, db, sets)
	return err
}

// querier is a connection or a pool.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// compare compares the applied migrations with those of the sets. Besides the error of Check it returns the names of
// the service's own migrations that were applied with other content.
func compare(ctx context.Context, db querier, sets []*set) (edited []string, err error) {
	if err := exists(ctx, db, sets); err != nil {
		return nil, err
	}
	var pending []string
	for _, s := range sets {
		applied, err := s.applied(ctx, db)
		if err != nil {
			return nil, fmt.Errorf("read the schema's version: %w", err)
		}
		changed, err := s.judge(applied)
		if err != nil {
			return nil, err
		}
		edited = append(edited, changed...)
		for _, number := range slices.Sorted(maps.Keys(s.files)) {
			if _, found := applied[number]; !found {
				pending = append(pending, s.files[number].name)
			}
		}
	}
	if len(pending) > 0 {
		return edited, tooOld(pending)
	}
	return edited, nil
}

// exists refuses a database without the version tables of both sets.
func exists(ctx context.Context, db querier, sets []*set) error {
	var core, own bool
	err := db.QueryRow(ctx, `SELECT to_regclass($1) IS NOT NULL, to_regclass($2) IS NOT NULL`,
		"public."+sets[0].table, "public."+sets[1].table).Scan(&core, &own)
	switch {
	case err != nil:
		return fmt.Errorf("look for a schema: %w", err)
	case core && own:
		return nil
	case own:
		return &Refusal{ErrForeign, "it has " + sets[1].table + " but no " + sets[0].table +
			", like that of another program, or of this one before version 0.1.0", "use a new database"}
	}
	return &Refusal{ErrNoSchema, "", "run `shop migrate`"}
}

// applied returns the applied migrations by number.
func (s *set) applied(ctx context.Context, db querier) (map[int64]file, error) {
	rows, err := db.Query(ctx, `SELECT version_id, name, sha256, breaks FROM public.`+s.table+`
		WHERE is_applied AND version_id > 0`)
	if err != nil {
		return nil, err
	}
	applied := make(map[int64]file)
	var number int64
	var m file
	_, err = pgx.ForEachRow(rows, []any{&number, &m.name, &m.sum, &m.breaks}, func() error {
		applied[number] = m
		return nil
	})
	return applied, err
}

// judge refuses applied migrations that this binary cannot work with. Those of the service's own set may change, but
// are not applied again: judge returns their names.
func (s *set) judge(applied map[int64]file) (edited []string, err error) {
	for _, number := range slices.Sorted(maps.Keys(applied)) {
		found := applied[number]
		ours, known := s.files[number]
		switch {
		case !known && found.breaks > s.newest():
			return nil, s.tooNew(number, found)
		case !known, found.sum == "", found.sum == ours.sum: // goose's own tools store no sum
		case s.core:
			return nil, &Refusal{ErrChanged, ours.name + " is not the file that was applied",
				"restore the file and put the change into a new migration, or use a new database"}
		case found.name != ours.name: // as after a merge of two branches
			return nil, &Refusal{ErrChanged, ours.name + " is not applied, but " + found.name + " has its number",
				"give the file another number"}
		default:
			edited = append(edited, ours.name)
		}
	}
	return edited, nil
}

func (s *set) tooNew(number int64, found file) error {
	name := found.name
	if name == "" {
		name = s.number(number)
	}
	return &Refusal{ErrTooNew, fmt.Sprintf("%s breaks versions without %s, and this one supports the schema up to %s",
		name, s.number(found.breaks), s.number(s.newest())), "deploy a newer version"}
}

// number writes the number of a migration as in the names of files.
func (s *set) number(n int64) string { return fmt.Sprintf("%s%04d", s.folder, n) }

func tooOld(pending []string) error {
	detail := pending[0] + " is not applied"
	if len(pending) > 1 {
		detail = fmt.Sprintf("%s and %d more are not applied", pending[0], len(pending)-1)
	}
	return &Refusal{ErrTooOld, detail, "run `shop migrate`"}
}
