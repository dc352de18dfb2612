package migrations_test

func init() {
	locking = append(locking, `operation_sweep('1 h')`)
	for role, statements := range map[string][]string{
		"shop_api": {
			// Execute a call, change its signed parts, or forget a result.
			`UPDATE operation SET response = ''`, `UPDATE operation SET caller = 'another'`,
			`UPDATE operation SET identity = ''`, `DELETE FROM operation`, `SELECT operation_sweep('0')`,
		},
		"shop_relay": {`SELECT FROM operation`, `SELECT operation_sweep('0')`},
		"shop_consumer": {
			`UPDATE operation SET caller = 'another'`, `UPDATE operation SET identity = ''`, `DELETE FROM operation`,
			`SELECT operation_cancel(outbox_uuidv7(), '')`,
		},
		"shop_operator": {
			`UPDATE operation SET state = 'pending'`, `INSERT INTO operation (id) VALUES (outbox_uuidv7())`,
			`DELETE FROM operation`,
		},
	} {
		denied[role] = append(denied[role], statements...)
	}
}
