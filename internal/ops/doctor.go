package ops

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"example.com/shop/internal/rabbit"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Verdict is the result of a check.
type Verdict string

const (
	OK Verdict = "ok"
	// Attention means that the service works and an operator should have a look.
	Attention Verdict = "attention"
	// Unknown means that the check could not run. It says nothing about the subject of the check.
	Unknown Verdict = "unknown"
	Wrong   Verdict = "wrong"
)

// Finding is the result of a check. If there is something to fix, it has the cure: for what the check found, or for
// what kept it from running.
type Finding struct {
	Check   string  `json:"check"`
	Verdict Verdict `json:"verdict"`
	Detail  string  `json:"detail"`
	Cure    string  `json:"cure,omitempty"`
	// Skipped are the checks that could not run for the same reason. They have no findings of their own.
	Skipped []string `json:"skipped,omitempty"`

	cause cause
}

// Target is what the doctor examines.
type Target struct {
	DB *pgxpool.Pool
	// ListenURL is where the relay listens, "" if it only polls. PostgresURL is where writers ring.
	PostgresURL, ListenURL string
	AMQPURL                string
	// ManagementURL is RabbitMQ's management API, "" if the doctor must not query it.
	ManagementURL string
	Topology      rabbit.Topology
	// LongestRedelivery is the longest time from a message's last publishing to its effect.
	LongestRedelivery time.Duration
	// CheckTimeout limits a check. Default 10 s.
	CheckTimeout time.Duration
}

// check is one check of the doctor. It returns an error if it cannot run, and a Finding otherwise. The two have
// different cures.
type check struct {
	name string
	run  func(context.Context, Target) (Finding, error)
	cure string // for what it finds, unless the finding has one
}

var databaseChecks = []check{
	{"database", checkDatabase, ""},
	{"schema", checkSchema, "Run the command migrate."},
	{"grants", checkGrants, "Run the command migrate as the owner of the tables."},
	{"indexes", checkIndexes, "REINDEX CONCURRENTLY the invalid ones; run the command migrate for the missing ones."},
	{"durability", checkDurability,
		"Set synchronous_commit to on (or stricter) for the database and its roles, and fsync to on."},
	{"settings", checkSettings, "Reset the setting with ALTER DATABASE ... RESET or ALTER ROLE ... RESET, as named."},
	{"clock", checkClock,
		"Synchronise the clocks of this machine and of Postgres with NTP, by slewing and not in steps."},
	{"cluster", checkCluster, "Run the command outbox repair once, then start the relay."},
	{"sequences", checkSequences, "Run the command outbox repair once."},
	{"relay", checkRelay, "Start a relay, and read its log."},
	{"backlog", checkBacklog, "Check that the broker is reachable and accepts messages, and read the relay's log."},
	{"doorbell", checkDoorbell,
		"Set POSTGRES_LISTEN_URL to a direct connection; a transaction-mode pooler drops LISTEN."},
	{"retention", checkRetention, "Shorten the slots of the outbox (outbox_slot_length), or the retries of the inbox."},
	{"vacuum", checkVacuum, "End the named session, prepared transaction or replication slot."},
	{"retries", checkRetries, "Read the message's last error, and fix the handler or what it depends on."},
}

var brokerChecks = []check{
	{"broker", checkBroker, ""},
	{"queues", checkQueues, "Empty and delete the queue that differs, or give the new one another name."},
	{"policies", checkPolicies, "Exclude our queues by the policy's pattern, or remove the setting from the policy."},
	{"publishers", checkPublishers, "Use the users of the command topology --users, or set topic permissions."},
}

// Doctor runs every check, one after the other. A check that cannot run is also a finding, with the cure of the
// obstacle. Checks that cannot run for the same reason share one finding. When ctx ends, the remaining checks do not
// run.
func Doctor(ctx context.Context, target Target) []Finding {
	findings := runChecks(ctx, target, databaseChecks, "POSTGRES_URL", databaseCause)
	return append(findings, runChecks(ctx, target, brokerChecks, "AMQP_URL", brokerCause)...)
}

// runChecks runs the checks of one server. setting names the server's URL. The first check shows whether the server is
// reachable.
func runChecks(
	ctx context.Context, target Target, checks []check, setting string, findCause findCause,
) (findings []Finding) {
	for i, c := range checks {
		finding, err := c.limited(ctx, target)
		if ctx.Err() != nil {
			return findings
		}
		if err != nil {
			finding = notRun(err, findCause(err, setting))
			same := func(other Finding) bool { return other.cause.kind == finding.cause.kind }
			if j := slices.IndexFunc(findings, same); j >= 0 {
				findings[j].Skipped = append(findings[j].Skipped, c.name)
				continue
			}
		}
		finding.Check, finding.Verdict = c.name, cmp.Or(finding.Verdict, OK)
		if finding.Verdict != OK {
			finding.Cure = cmp.Or(finding.Cure, c.cure)
		}
		if finding.cause.blocksAll || err != nil && i == 0 {
			for _, other := range checks[i+1:] {
				finding.Skipped = append(finding.Skipped, other.name)
			}
			return append(findings, finding)
		}
		findings = append(findings, finding)
	}
	return findings
}

func (c check) limited(ctx context.Context, target Target) (Finding, error) {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(target.CheckTimeout, 10*time.Second))
	defer cancel()
	return c.run(ctx, target)
}

// notRun is the finding of a check that could not run.
func notRun(err error, why cause) Finding {
	text := strings.Join(strings.Fields(err.Error()), " ") // errors of drivers may have several lines
	return Finding{Verdict: Unknown, Detail: "could not run: " + text, Cure: why.cure, cause: why}
}

// Worst returns the most serious verdict of the findings.
func Worst(findings []Finding) Verdict {
	order := []Verdict{OK, Attention, Unknown, Wrong}
	worst := slices.MaxFunc(findings, func(a, b Finding) int {
		return slices.Index(order, a.Verdict) - slices.Index(order, b.Verdict)
	})
	return worst.Verdict
}
