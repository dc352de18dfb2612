package main

import "github.com/alecthomas/kong"

// helpTexts are help texts that are too long for a struct tag, which refers to one as ${name}.
var helpTexts = kong.Vars{
	"doctor": "Check the database, the broker and the service; exit 1 if a check fails or cannot run.",

	"max_conns": "Maximum connections of one process to Postgres, 3 to 1000.",
	"listen_url": "Direct connection to the same database for LISTEN/NOTIFY, " +
		"if the other one is a transaction-mode pooler.",
	"management_url": "RabbitMQ's management API, to find policies that lose messages. " +
		"Its user needs the tag management; to find users that may publish everything, administrator.",
	"topology_mode": "declare: the process creates the exchange and queues; given: it expects them to exist.",
	"ops_listen":    "Address for probes and metrics, in plain HTTP: /healthz, /readyz, /metrics.",

	"max_backlog": "Number of messages waiting for the broker at which the API refuses writes with resource_exhausted; " +
		"0 for no limit.",
	"max_backlog_age": "The same for the age of the oldest message waiting for the broker; 0s for no limit.",
	"page_rows":       "Maximum messages of one page, 1 to 5000. A crash of the relay repeats at most two pages.",
	"poll_interval":   "Maximum time between two polls of the outbox if no doorbell rings, 10ms to 1m.",
	"retention":       "Minimum time to keep delivered messages for replay, 1m to 32h.",

	"roles_claim": "Claim that lists a caller's roles: its name, or a path to a nested claim, " +
		"such as realm_access.roles.",
	"no_auth_hosts": "Host names that --insecure-no-auth accepts besides localhost and loopback addresses, " +
		"separated by commas.",
	"tls_cert": "Certificate chain (PEM) for HTTPS. A new file takes effect without a restart.",
	"tls_client_ca": "Authorities (PEM) whose client certificates are credentials: " +
		"the common name or SPIFFE ID is the caller, the organizations are its roles.",
	"tls_client_required": "Refuse connections without a client certificate.",
	"caller_rate":         "Sustained calls per second of one caller, 0 to 1000000; 0 for no limit.",
	"caller_concurrency": "Maximum calls of one caller in flight, streams included, 0 or more; " +
		"0 for no limit.",
	"read_max_bytes": "Maximum size of a request message in bytes, before and after decompression, 1024 to 67108864.",
	"in_flight_max_bytes": "Memory budget in bytes of all requests in flight, 0 to 1099511627776; " +
		"one caller may use a quarter of it; 0 for a sixth of the memory limit, or 256 MiB without one.",
	"max_http_conns": "Maximum connections to the API, 1 to 1000000.",
	"conns_per_address": "Maximum connections from one address (of IPv6 a /64), -1 to 1000000; " +
		"0 for no limit, -1 for a quarter of --http-max-conns.",
	"cors_origins": "Web origins whose pages may call, such as https://console.example, separated by commas.",

	"shards": "Number of shards of the outbox, 0 to 64: at most that many relays work at once. " +
		"0 keeps the present number, which is 1 in a new database.",
	"migrate_wait":    "How long to wait for a Postgres that does not answer or accepts no logins yet, 0s to 24h.",
	"healthcheck_url": "Readiness URL of the process, on its operators' port.",
	"since":           "Start time: 2026-01-31T09:00:00Z, 2026-01-31 (local time), or an age such as 90m.",
	"replay_group":    "Publish only to the queue of this consumer group, such as a new one, and only what it handles.",
	"replay_after":    "Continue after this place, where a replay with the same filters was interrupted.",
	"force": "Also redrive messages that may have been applied already, " +
		"because their copies can no longer be detected.",
	"topology": "Show or declare the exchange and queues that the service needs, and show its permissions.",
	"users": "Create a user of the broker for each process, named PREFIX-PROCESS, " +
		"with exactly the printed permissions in the vhost, those on topics included, and no tags.",
	"users_password":    "Password of the users that --users creates, any text.",
	"topology_amqp_url": "RabbitMQ and vhost, as a user who may configure them; needed to declare.",

	"rpc_http": "Call over HTTP/2 (default, with http://127.0.0.1:8080). " +
		"The server provides the schema of a service that is not part of this program.",
}
