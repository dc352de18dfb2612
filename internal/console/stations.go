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

// When an undelivered message is old enough to look, and when that counts as a fault.
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

// judge says of each station how it does, in the order of a message's way.
func (c *Console) judge(r *reading, v *velocity) []*opsv1.Station {
	all := []*opsv1.Station{c.api(r, v), log(r, v), relay(r, v), exchange(r, v)}
	for i, group := range c.config.Groups {
		standing := inbox.GroupStatus{Consumer: group.Name}
		if r.database == nil {
			standing = r.standings[i]
		}
		depth := rabbit.Depth{Queue: group.Queue}
		if r.broker == nil {
			depth = r.depths[i]
		}
		passed := v.applied[group.Name]
		all = append(all, queue(r, group, depth, standing, passed), crew(r, standing, depth, passed),
			effect(r, standing, passed))
	}
	return append(all, dead(r))
}

// because sets the state of a station and the sentence that says why.
func because(s *opsv1.Station, state opsv1.StationState, format string, args ...any) *opsv1.Station {
	s.State, s.Sentence = state, fmt.Sprintf(format, args...)
	return s
}

func blind(s *opsv1.Station) *opsv1.Station {
	return because(s, unknown, "Not known while the database is away.")
}

func (c *Console) api(r *reading, v *velocity) *opsv1.Station {
	s := &opsv1.Station{Kind: opsv1.StationKind_STATION_KIND_API, Name: "API", State: fine}
	if r.database != nil {
		return blind(s)
	}
	for _, name := range c.config.APIs {
		s.Processes = proto.Int32(s.GetProcesses() + int32(min(1, r.sessions[name])))
	}
	s.Rate = &v.inserted
	if s.GetProcesses() == 0 {
		return because(s, fault, "No API process is connected to the database.")
	}
	s.Processes = nil // connections are no count of processes
	return s
}

func log(r *reading, v *velocity) *opsv1.Station {
	s := &opsv1.Station{Kind: opsv1.StationKind_STATION_KIND_OUTBOX, Name: "outbox", State: fine}
	if r.database != nil {
		return because(s, fault, "The database cannot be reached: %s.", innermost(r.database))
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
		return because(s, fault, "%s to be published, the oldest for %s.", wait(waiting), age(lag))
	case lag > lateAfter.Seconds():
		return because(s, attention, "%s to be published, the oldest for %s.", wait(waiting), age(lag))
	}
	return s
}

func relay(r *reading, v *velocity) *opsv1.Station {
	s := &opsv1.Station{Kind: opsv1.StationKind_STATION_KIND_RELAY, Name: "relay", State: fine}
	if r.database != nil {
		return blind(s)
	}
	s.Processes, s.Rate = proto.Int32(int32(len(r.relays))), &v.published
	if len(r.relays) == 0 {
		return because(s, fault, "No relay is running.")
	}
	for _, shard := range r.shards {
		if !shard.Drained && shard.Owner == "" && !waitsForOlder(r.shards, shard) {
			return because(s, fault, "No relay holds the lease of shard %d.", shard.Shard)
		}
	}
	for _, one := range r.relays {
		if one.Problem != "" && r.broker != nil {
			return because(s, attention, "It waits for the broker.")
		}
		if one.Problem != "" {
			return because(s, fault, "It cannot publish: %s", one.Problem)
		}
	}
	return s
}

// waitsForOlder tells whether a shard is not to be read yet, because one of an older generation is not drained.
func waitsForOlder(shards []ops.Shard, one ops.Shard) bool {
	for _, other := range shards {
		if !other.Drained && other.Generation < one.Generation {
			return true
		}
	}
	return false
}

func exchange(r *reading, v *velocity) *opsv1.Station {
	s := &opsv1.Station{Kind: opsv1.StationKind_STATION_KIND_EXCHANGE, Name: "RabbitMQ", State: fine}
	if r.broker != nil {
		return because(s, fault, "The broker cannot be reached: %s.", innermost(r.broker))
	}
	if r.database == nil {
		s.Rate = &v.published
	}
	return s
}

func queue(r *reading, group Group, depth rabbit.Depth, standing inbox.GroupStatus, passed float64) *opsv1.Station {
	s := &opsv1.Station{Kind: opsv1.StationKind_STATION_KIND_QUEUE, Name: group.Queue, Group: group.Name, State: fine}
	switch {
	case r.broker != nil:
		return because(s, unknown, "Not known while the broker is away.")
	case depth.Missing:
		return because(s, fault, "There is no queue %s: start a consumer, or declare the topology.", group.Queue)
	}
	s.Waiting = &depth.Ready
	if r.database == nil {
		s.Rate = &passed
	}
	if depth.Consumers == 0 && depth.Ready > 0 && standing.Paused == nil {
		return because(s, attention, "%s, and nobody takes them.", wait(depth.Ready))
	}
	for _, one := range r.dangers {
		if one.Loses && (one.Queue == group.Queue || one.Queue == rabbit.DeadQueue(group.Queue)) {
			return because(s, attention, "Messages can be lost: %s.", one)
		}
	}
	return s
}

func crew(r *reading, standing inbox.GroupStatus, depth rabbit.Depth, passed float64) *opsv1.Station {
	s := &opsv1.Station{Kind: opsv1.StationKind_STATION_KIND_GROUP, Name: standing.Consumer, Group: standing.Consumer,
		State: fine}
	if r.database != nil {
		return blind(s)
	}
	s.Processes, s.Rate, s.Waiting = proto.Int32(int32(len(standing.Applied))), &passed, &standing.Retrying
	if standing.Retrying > 0 {
		s.Lag = &standing.Oldest
	}
	switch {
	case standing.Paused != nil:
		return because(s, attention, "Paused by %s: %s", standing.Paused.Actor, standing.Paused.Reason)
	case len(standing.Applied) == 0:
		return because(s, fault, "No process runs this group.")
	case r.broker == nil && !depth.Missing && depth.Consumers == 0:
		return because(s, fault, "Its processes do not take from the queue.")
	case standing.Blocked > 0:
		return because(s, attention, "%s for a retry, the longest for %s.",
			some(standing.Blocked, "key waits", "keys wait"), age(standing.Oldest))
	case standing.Retrying > 0:
		return because(s, attention, "%s for a retry.", wait(standing.Retrying))
	}
	return s
}

func effect(r *reading, standing inbox.GroupStatus, passed float64) *opsv1.Station {
	s := &opsv1.Station{Kind: opsv1.StationKind_STATION_KIND_EFFECT, Name: "effects", Group: standing.Consumer,
		State: fine}
	if r.database != nil {
		return blind(s)
	}
	s.Rate, s.Lag = &passed, standing.Lag
	return s
}

func dead(r *reading) *opsv1.Station {
	s := &opsv1.Station{Kind: opsv1.StationKind_STATION_KIND_DEAD_LETTERS, Name: "dead letters", State: fine}
	if r.database != nil {
		return blind(s)
	}
	s.Waiting = &r.dead
	if r.dead > 0 {
		return because(s, attention, "%s for somebody to decide.", wait(r.dead))
	}
	return s
}

func wait(n int64) string { return some(n, "message waits", "messages wait") }

func some(n int64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func age(seconds float64) string {
	return time.Duration(seconds * float64(time.Second)).Round(time.Second).String()
}

// innermost is what an error comes down to: the end of its chain, which is the part that people know.
func innermost(err error) string {
	text := strings.Join(strings.Fields(err.Error()), " ")
	return strings.Trim(text[strings.LastIndex(text, ": ")+1:], ` ".`)
}

// oneLine is an error in one line of bearable length.
func oneLine(err error) string {
	text := []rune(strings.Join(strings.Fields(err.Error()), " "))
	if len(text) > 200 {
		text = append(text[:199], '…')
	}
	return string(text)
}
