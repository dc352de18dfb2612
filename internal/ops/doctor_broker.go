package ops

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"example.com/shop/internal/rabbit"
)

func checkBroker(ctx context.Context, target Target) (Finding, error) {
	version, err := rabbit.Version(ctx, target.AMQPURL)
	if err != nil {
		return Finding{}, err
	}
	return judgeBroker(version), nil
}

// oldestRabbitMQ is the oldest major version that still gets fixes.
const oldestRabbitMQ = 4

func judgeBroker(version string) Finding {
	finding := Finding{Detail: version}
	_, number, _ := strings.Cut(version, " ")
	major, _, _ := strings.Cut(number, ".")
	if n, err := strconv.Atoi(major); err != nil || n < oldestRabbitMQ {
		finding.Verdict = Attention
		finding.Cure = fmt.Sprintf("Plan the upgrade to RabbitMQ %d: this version works but gets no more fixes.",
			oldestRabbitMQ)
	}
	return finding
}

func checkQueues(ctx context.Context, target Target) (Finding, error) {
	missing, differing, err := target.Topology.Compare(ctx, target.AMQPURL)
	if finding, broken := brokenQueue(err); broken {
		return finding, nil
	}
	switch {
	case err != nil:
		return Finding{}, err
	case len(differing) > 0:
		return listFinding(differing, nil, Wrong, "")
	case len(missing) > 0:
		finding, err := listFinding(missing, nil, Attention, "")
		finding.Cure = "Start the relay or a consumer: they declare missing queues."
		return finding, err
	}
	return Finding{Detail: fmt.Sprintf("%d queues are as declared", 2*len(target.Topology.Queues))}, nil
}
