package ops

import "context"

// checkPolicies looks for policies of the broker that change when messages leave our queues. Neither AMQP nor the
// queues themselves show them.
func checkPolicies(ctx context.Context, p Target) (Finding, error) {
	if p.ManagementURL == "" {
		return Finding{Detail: "not looked at, since RABBITMQ_MANAGEMENT_URL is not given"}, nil
	}
	dangers, err := p.Topology.Policies(ctx, p.ManagementURL, p.AMQPURL)
	if err != nil {
		const cure = "Check RABBITMQ_MANAGEMENT_URL; its user needs the tag management."
		return Finding{Verdict: Attention, Detail: err.Error(), Cure: cure}, nil
	}
	var found []string
	verdict := Attention
	for _, one := range dangers {
		found = append(found, one.String())
		if one.Loses {
			verdict = Wrong
		}
	}
	return none(found, nil, verdict, "none drops messages of ours")
}
