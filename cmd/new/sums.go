package main

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// coreMigrations is the folder of the core's migrations. In a new tree they differ from the template's only in the
// service's name, so that the template's next version makes the same files again: migrate refuses a database in which
// other ones were applied.
const coreMigrations = "migrations/core/"

// writeSums lists the checksums of the core's migrations in the new tree, in the format of sha256sum. The template's
// are of other texts, because the names of the roles contain the service's name.
func writeSums(tree string) error {
	folder := filepath.Join(tree, filepath.FromSlash(coreMigrations))
	files, err := filepath.Glob(filepath.Join(folder, "*.sql"))
	if err != nil {
		return err
	}
	var list strings.Builder
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		fmt.Fprintf(&list, "%x  %s\n", sha256.Sum256(text), filepath.Base(file))
	}
	return os.WriteFile(filepath.Join(folder, "SHA256SUMS"), []byte(list.String()), 0o644)
}
