package ops

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"example.com/shop/internal/rabbit"
)

func checkBroker(ctx context.Context, p Target) (Finding, error) {
	version, err := rabbit.Version(ctx, p.AMQPURL)
	if err != nil {
		return Finding{}, err
	}
	return judgeBroker(version), nil
}

// oldestRabbitMQ is the oldest major version that is still mended.
const oldestRabbitMQ = 4

func judgeBroker(version string) Finding {
	finding := Finding{Detail: version}
	_, number, _ := strings.Cut(version, " ")
	major, _, _ := strings.Cut(number, ".")
	if n, err := strconv.Atoi(major); err != nil || n < oldestRabbitMQ {
		finding.Verdict = Attention
		finding.Cure = fmt.Sprintf("Plan the way to RabbitMQ %d: it works with this one, which is not mended any more.",
			oldestRabbitMQ)
	}
	return finding
}

func checkQueues(ctx context.Context, p Target) (Finding, error) {
	missing, differing, err := p.Topology.Compare(ctx, p.AMQPURL)
	if finding, broken := brokenQueue(err); broken {
		return finding, nil
	}
	switch {
	case err != nil:
		return Finding{}, err
	case len(differing) > 0:
		return none(differing, nil, Wrong, "")
	case len(missing) > 0:
		finding, err := none(missing, nil, Attention, "")
		finding.Cure = "Start the relay or a consumer: they declare what is missing."
		return finding, err
	}
	return Finding{Detail: fmt.Sprintf("%d queues are as wanted", 2*len(p.Topology.Queues))}, nil
}
