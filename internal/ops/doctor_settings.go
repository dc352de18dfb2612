package ops

import (
	"context"
	"fmt"
	"strings"

	"example.com/shop/internal/session"
	"github.com/jackc/pgx/v5"
)

// The settings of the database, of every role in it, and of the service's own roles.
const settingsSQL = `
SELECT CASE setrole WHEN 0 THEN 'the database' ELSE 'role ' || setrole::regrole END, split_part(setting, '=', 1),
    substr(setting, strpos(setting, '=') + 1)
FROM pg_db_role_setting CROSS JOIN unnest(setconfig) AS setting
WHERE setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
  AND (setrole IN (0, session_user::regrole) OR setrole::regrole::text LIKE 'shop\_%')
ORDER BY 1, 2`

// checkSettings names what the database or a role sets that the service sets otherwise for its own sessions. Sessions
// of others, psql among them, follow the database.
func checkSettings(ctx context.Context, p Target) (Finding, error) {
	rows, err := p.DB.Query(ctx, settingsSQL)
	if err != nil {
		return Finding{}, err
	}
	var differ []string
	var whose, name, value string
	_, err = pgx.ForEachRow(rows, []any{&whose, &name, &value}, func() error {
		for _, one := range session.Pinned {
			if one.Name == name && !strings.EqualFold(one.Value, value) {
				differ = append(differ, fmt.Sprintf("%s sets %s to %s, and the service to %s", whose, name, value,
					one.Value))
			}
		}
		return nil
	})
	return none(differ, err, Attention, "sessions are as the service sets them")
}
