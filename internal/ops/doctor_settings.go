package ops

import (
	"context"
	"fmt"
	"strings"

	"example.com/shop/internal/session"
	"github.com/jackc/pgx/v5"
)

// settingsSQL reads the settings of the database, of every role in it, and of the service's own roles.
const settingsSQL = `
SELECT CASE setrole WHEN 0 THEN 'the database' ELSE 'role ' || setrole::regrole END, split_part(setting, '=', 1),
    substr(setting, strpos(setting, '=') + 1)
FROM pg_db_role_setting CROSS JOIN unnest(setconfig) AS setting
WHERE setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
  AND (setrole IN (0, session_user::regrole) OR setrole::regrole::text LIKE 'shop\_%')
ORDER BY 1, 2`

// checkSettings finds settings of the database or of a role that differ from those of the service's own sessions. Other
// sessions, such as those of psql, follow the database.
func checkSettings(ctx context.Context, target Target) (Finding, error) {
	rows, err := target.DB.Query(ctx, settingsSQL)
	if err != nil {
		return Finding{}, err
	}
	var differ []string
	var whose, name, value string
	_, err = pgx.ForEachRow(rows, []any{&whose, &name, &value}, func() error {
		for _, pinned := range session.Pinned {
			if pinned.Name == name && !strings.EqualFold(pinned.Value, value) {
				differ = append(differ,
					fmt.Sprintf("%s sets %s to %s, the service sets it to %s", whose, name, value, pinned.Value))
			}
		}
		return nil
	})
	return listFinding(differ, err, Attention, "nothing differs from what the service sets")
}
