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

// Verdict is how a check ended.
type Verdict string

const (
	OK Verdict = "ok"
	// Attention: it works, and somebody should look.
	Attention Verdict = "attention"
	// Unknown: the check could not be made. That says nothing about what it looks for.
	Unknown Verdict = "unknown"
	Wrong   Verdict = "wrong"
)

// Finding is a check with its verdict, and the cure if there is something to be cured: of what was found, or of what
// kept the check from looking.
type Finding struct {
	Check   string  `json:"check"`
	Verdict Verdict `json:"verdict"`
	Detail  string  `json:"detail"`
	Cure    string  `json:"cure,omitempty"`
	// Skipped are the checks that could not be made for the same reason. They have no findings of their own.
	Skipped []string `json:"skipped,omitempty"`

	cause cause
}

// Target is what the doctor looks at.
type Target struct {
	DB *pgxpool.Pool
	// ListenURL is where the relay listens, "" if it polls; PostgresURL is where writers ring.
	PostgresURL, ListenURL string
	AMQPURL                string
	// ManagementURL is RabbitMQ's management API, "" if nothing is asked of it.
	ManagementURL string
	Topology      rabbit.Topology
	// LongestRedelivery is how long a message may be under way from its last publishing to its effect.
	LongestRedelivery time.Duration
	// CheckTimeout is how long a check may take. Default 10 s.
	CheckTimeout time.Duration
}

// check is one thing that the doctor looks at. A check that cannot be made returns an error, and whatever it finds is a
// Finding: the two have different cures.
type check struct {
	name string
	run  func(context.Context, Target) (Finding, error)
	cure string // of what it finds, unless the finding has one
}

var databaseChecks = []check{
	{"database", checkDatabase, ""},
	{"schema", checkSchema, "Run the command migrate."},
	{"grants", checkGrants, "Run the command migrate as the owner of the tables."},
	{"indexes", checkIndexes, "REINDEX CONCURRENTLY the invalid ones; run the command migrate for the missing ones."},
	{"durability", checkDurability,
		"Set synchronous_commit to on (or stricter) for the database and its roles, and fsync to on."},
	{"settings", checkSettings, "ALTER DATABASE ... RESET it, or ALTER ROLE ... RESET it, whichever is named."},
	{"clock", checkClock,
		"Synchronise the clocks of this machine and of Postgres' (NTP), by slewing and not by steps."},
	{"cluster", checkCluster, "Run the command outbox repair once, then start the relay."},
	{"sequences", checkSequences, "Run the command outbox repair once."},
	{"relay", checkRelay, "Start a relay, and look at its log."},
	{"backlog", checkBacklog, "See whether the broker is reachable and takes messages, and look at the relay's log."},
	{"doorbell", checkDoorbell,
		"Give a direct connection as POSTGRES_LISTEN_URL; a transaction-mode pooler drops LISTEN."},
	{"retention", checkRetention, "Shorten the slots of the outbox (outbox_slot_length), or the retries of the inbox."},
	{"vacuum", checkVacuum, "End the session, prepared transaction or replication slot that is named."},
	{"retries", checkRetries, "See the message's last error; mend the handler or what it needs."},
}

var brokerChecks = []check{
	{"broker", checkBroker, ""},
	{"queues", checkQueues, "Empty and delete the queue that differs, or give the new one another name."},
	{"policies", checkPolicies, "Except our queues from the policy (its pattern), or take the setting out of it."},
}

// Doctor makes every check, one after the other. A check that cannot be made is a finding, too, with the cure of what
// is in its way; checks that cannot be made for the same reason share it. When ctx ends, the checks that are left are
// not made.
func Doctor(ctx context.Context, p Target) []Finding {
	findings := series(ctx, p, databaseChecks, "POSTGRES_URL", databaseCause)
	return append(findings, series(ctx, p, brokerChecks, "AMQP_URL", brokerCause)...)
}

// series makes the checks of one server, which the setting names. The first of them shows whether it can be reached.
func series(ctx context.Context, p Target, checks []check, setting string, judge judge) (findings []Finding) {
	for i, one := range checks {
		finding, err := one.limited(ctx, p)
		if ctx.Err() != nil {
			return findings
		}
		if err != nil {
			finding = blind(err, judge(err, setting))
			same := func(other Finding) bool { return other.cause.kind == finding.cause.kind }
			if j := slices.IndexFunc(findings, same); j >= 0 {
				findings[j].Skipped = append(findings[j].Skipped, one.name)
				continue
			}
		}
		finding.Check, finding.Verdict = one.name, cmp.Or(finding.Verdict, OK)
		if finding.Verdict != OK {
			finding.Cure = cmp.Or(finding.Cure, one.cure)
		}
		if finding.cause.whole || err != nil && i == 0 {
			for _, other := range checks[i+1:] {
				finding.Skipped = append(finding.Skipped, other.name)
			}
			return append(findings, finding)
		}
		findings = append(findings, finding)
	}
	return findings
}

func (c check) limited(ctx context.Context, p Target) (Finding, error) {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(p.CheckTimeout, 10*time.Second))
	defer cancel()
	return c.run(ctx, p)
}

// blind is the finding that a check could not be made.
func blind(err error, why cause) Finding {
	text := strings.Join(strings.Fields(err.Error()), " ") // drivers break lines
	return Finding{Verdict: Unknown, Detail: "could not look: " + text, Cure: why.cure, cause: why}
}

// Worst is the most serious verdict among findings.
func Worst(findings []Finding) Verdict {
	order := []Verdict{OK, Attention, Unknown, Wrong}
	worst := slices.MaxFunc(findings, func(a, b Finding) int {
		return slices.Index(order,
			a.Verdict) - slices.Index(order, b.Verdict)
	})
	return worst.Verdict
}
