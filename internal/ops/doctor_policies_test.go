package ops

import (
	"fmt"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
)

// policy makes a policy for all queues of the vhost, and waits until it is in force.
func (c *clinic) policy(t *testing.T, setting string, value int) {
	t.Helper()
	testenv.Management(t, c.AMQPURL).Policy("limits", ".*", map[string]any{setting: value}, false)
	testenv.Eventually(t, 20*time.Second, func() error {
		found, err := c.Topology.Policies(t.Context(), c.ManagementURL, c.AMQPURL)
		if err == nil && len(found) < 2 {
			err = fmt.Errorf("in force: %v", found)
		}
		return err
	})
}

func TestDoctorSaysThatItLooksAtNoPolicies(t *testing.T) {
	t.Parallel()
	finding, err := checkPolicies(t.Context(), Target{})
	const want = "not looked at, since RABBITMQ_MANAGEMENT_URL is not given"
	if err != nil || finding.Verdict != "" || finding.Detail != want {
		t.Errorf("got %+v, %v", finding, err)
	}
}
