package ops

import "context"

// checkPolicies finds policies of the broker that change when messages leave our queues. Neither AMQP nor the queues
// themselves show them.
func checkPolicies(ctx context.Context, target Target) (Finding, error) {
	if target.ManagementURL == "" {
		return Finding{Detail: "not checked, because RABBITMQ_MANAGEMENT_URL is not set"}, nil
	}
	dangers, err := target.Topology.Policies(ctx, target.ManagementURL, target.AMQPURL)
	if err != nil {
		const cure = "Check RABBITMQ_MANAGEMENT_URL; its user needs the tag management."
		return Finding{Verdict: Attention, Detail: err.Error(), Cure: cure}, nil
	}
	var found []string
	verdict := Attention
	for _, danger := range dangers {
		found = append(found, danger.String())
		if danger.Loses {
			verdict = Wrong
		}
	}
	return listFinding(found, nil, verdict, "none drops our messages")
}
