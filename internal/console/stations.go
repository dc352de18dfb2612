package console

import (
	"fmt"
	"strings"
	"time"

	opsv1 "example.com/shop/internal/gen/ops/v1"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/rabbit"
	"google.golang.org/protobuf/proto"
)

// Ages of an undelivered message that need attention, and that are a fault.
const (
	lateAfter  = 10 * time.Second
	faultAfter = time.Minute
)

const (
	fine      = opsv1.StationState_STATION_STATE_OK
	attention = opsv1.StationState_STATION_STATE_ATTENTION
	fault     = opsv1.StationState_STATION_STATE_FAULT
	unknown   = opsv1.StationState_STATION_STATE_UNKNOWN
)

// stations returns the state of each station, in the order in which messages pass them.
func (c *Console) stations(r *reading, v *rates) []*opsv1.Station {
	all := []*opsv1.Station{c.apiStation(r, v), outboxStation(r, v), relayStation(r, v), exchangeStation(r, v)}
	for i, group := range c.config.Groups {
		status := inbox.GroupStatus{Consumer: group.Name}
		if r.database == nil {
			status = r.groups[i]
		}
		depth := rabbit.Depth{Queue: group.Queue}
		if r.broker == nil {
			depth = r.depths[i]
		}
		rate := v.applied[group.Name]
		all = append(all,
			queueStation(r, group, depth, status, rate), groupStation(r, status, depth, rate), effectStation(r, status, rate))
	}
	return append(all, deadLetterStation(r))
}

// withState sets the state of a station and a sentence with the reason.
func withState(s *opsv1.Station, state opsv1.StationState, format string, args ...any) *opsv1.Station {
	s.State, s.Sentence = state, fmt.Sprintf(format, args...)
	return s
}

func withoutDatabase(s *opsv1.Station) *opsv1.Station {
	return withState(s, unknown, "Unknown while the database is unreachable.")
}

func (c *Console) apiStation(r *reading, v *rates) *opsv1.Station {
	s := &opsv1.Station{Kind: opsv1.StationKind_STATION_KIND_API, Name: "API", State: fine}
	if r.database != nil {
		return withoutDatabase(s)
	}
	for _, name := range c.config.APIs {
		s.Processes = proto.Int32(s.GetProcesses() + int32(min(1, r.sessions[name])))
	}
	s.Rate = &v.inserted
	if s.GetProcesses() == 0 {
		return withState(s, fault, "No API process is connected to the database.")
	}
	s.Processes = nil // the number of connections is not the number of processes
	return s
}

func outboxStation(r *reading, v *rates) *opsv1.Station {
	s := &opsv1.Station{Kind: opsv1.StationKind_STATION_KIND_OUTBOX, Name: "outbox", State: fine}
	if r.database != nil {
		return withState(s, fault, "The database cannot be reached: %s.", innermost(r.database))
	}
	var waiting int64
	var lag float64
	for _, shard := range r.shards {
		if !shard.Drained {
			waiting, lag = waiting+shard.Backlog, max(lag, shard.Lag)
		}
	}
	s.Rate, s.Waiting, s.Lag = &v.inserted, &waiting, &lag
	switch {
	case lag > faultAfter.Seconds():
		return withState(s, fault, "%s to be published, the oldest for %s.", wait(waiting), age(lag))
	case lag > lateAfter.Seconds():
		return withState(s, attention, "%s to be published, the oldest for %s.", wait(waiting), age(lag))
	}
	return s
}

func relayStation(r *reading, v *rates) *opsv1.Station {
	s := &opsv1.Station{Kind: opsv1.StationKind_STATION_KIND_RELAY, Name: "relay", State: fine}
	if r.database != nil {
		return withoutDatabase(s)
	}
	s.Processes, s.Rate = proto.Int32(int32(len(r.relays))), &v.published
	if len(r.relays) == 0 {
		return withState(s, fault, "No relay is running.")
	}
	for _, shard := range r.shards {
		if !shard.Drained && shard.Owner == "" && !waitsForOlder(r.shards, shard) {
			return withState(s, fault, "No relay holds the lease of shard %d.", shard.Shard)
		}
	}
	for _, relay := range r.relays {
		if relay.Problem != "" && r.broker != nil {
			return withState(s, attention, "It waits for the broker.")
		}
		if relay.Problem != "" {
			return withState(s, fault, "It cannot publish: %s", relay.Problem)
		}
	}
	return s
}

// waitsForOlder tells whether relays do not read a shard yet because a shard of an older generation is not drained.
func waitsForOlder(shards []ops.Shard, shard ops.Shard) bool {
	for _, other := range shards {
		if !other.Drained && other.Generation < shard.Generation {
			return true
		}
	}
	return false
}

func exchangeStation(r *reading, v *rates) *opsv1.Station {
	s := &opsv1.Station{Kind: opsv1.StationKind_STATION_KIND_EXCHANGE, Name: "RabbitMQ", State: fine}
	if r.broker != nil {
		return withState(s, fault, "The broker cannot be reached: %s.", innermost(r.broker))
	}
	if r.database == nil {
		s.Rate = &v.published
	}
	return s
}

func queueStation(
	r *reading, group Group, depth rabbit.Depth, status inbox.GroupStatus, rate float64,
) *opsv1.Station {
	s := &opsv1.Station{Kind: opsv1.StationKind_STATION_KIND_QUEUE, Name: group.Queue, Group: group.Name, State: fine}
	switch {
	case r.broker != nil:
		return withState(s, unknown, "Unknown while the broker is unreachable.")
	case depth.Missing:
		return withState(s, fault, "There is no queue %s: start a consumer, or declare the topology.", group.Queue)
	}
	s.Waiting = &depth.Ready
	if r.database == nil {
		s.Rate = &rate
	}
	if depth.Consumers == 0 && depth.Ready > 0 && status.Paused == nil {
		return withState(s, attention, "%s, and the queue has no consumers.", wait(depth.Ready))
	}
	for _, danger := range r.dangers {
		if danger.Loses && (danger.Queue == group.Queue || danger.Queue == rabbit.DeadQueue(group.Queue)) {
			return withState(s, attention, "Messages can be lost: %s.", danger)
		}
	}
	return s
}

func groupStation(r *reading, status inbox.GroupStatus, depth rabbit.Depth, rate float64) *opsv1.Station {
	const kind = opsv1.StationKind_STATION_KIND_GROUP
	s := &opsv1.Station{Kind: kind, Name: status.Consumer, Group: status.Consumer, State: fine}
	if r.database != nil {
		return withoutDatabase(s)
	}
	s.Processes, s.Rate, s.Waiting = proto.Int32(int32(len(status.Applied))), &rate, &status.Retrying
	if status.Retrying > 0 {
		s.Lag = &status.Oldest
	}
	switch {
	case status.Paused != nil:
		return withState(s, attention, "Paused by %s: %s", status.Paused.Actor, status.Paused.Reason)
	case len(status.Applied) == 0:
		return withState(s, fault, "No process runs this group.")
	case r.broker == nil && !depth.Missing && depth.Consumers == 0:
		return withState(s, fault, "Its processes do not consume from the queue.")
	case status.Blocked > 0:
		keys := some(status.Blocked, "key waits", "keys wait")
		return withState(s, attention, "%s for a retry, the longest for %s.", keys, age(status.Oldest))
	case status.Retrying > 0:
		return withState(s, attention, "%s for a retry.", wait(status.Retrying))
	}
	return s
}

func effectStation(r *reading, status inbox.GroupStatus, rate float64) *opsv1.Station {
	const kind = opsv1.StationKind_STATION_KIND_EFFECT
	s := &opsv1.Station{Kind: kind, Name: "effects", Group: status.Consumer, State: fine}
	if r.database != nil {
		return withoutDatabase(s)
	}
	s.Rate, s.Lag = &rate, status.Lag
	return s
}

func deadLetterStation(r *reading) *opsv1.Station {
	s := &opsv1.Station{Kind: opsv1.StationKind_STATION_KIND_DEAD_LETTERS, Name: "dead letters", State: fine}
	if r.database != nil {
		return withoutDatabase(s)
	}
	s.Waiting = &r.dead
	if r.dead > 0 {
		return withState(s, attention, "%s for a decision.", wait(r.dead))
	}
	return s
}

func wait(n int64) string { return some(n, "message waits", "messages wait") }

func some(n int64, singular, plural string) string {
	if n == 1 {
		return "1 " + singular
	}
	return fmt.Sprintf("%d %s", n, plural)
}

func age(seconds float64) string {
	return time.Duration(seconds * float64(time.Second)).Round(time.Second).String()
}

// innermost returns the end of an error's chain, which is the part that operators recognize.
func innermost(err error) string {
	text := strings.Join(strings.Fields(err.Error()), " ")
	return strings.Trim(text[strings.LastIndex(text, ": ")+1:], ` ".`)
}

// oneLine returns an error in one line of at most 200 characters.
func oneLine(err error) string {
	text := []rune(strings.Join(strings.Fields(err.Error()), " "))
	if len(text) > 200 {
		text = append(text[:199], '…')
	}
	return string(text)
}
