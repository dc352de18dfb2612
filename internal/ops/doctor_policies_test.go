package ops

import (
	"fmt"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
)

// policy sets a policy for all queues of the vhost, and waits until it is in force.
func (s *healthyService) policy(t *testing.T, setting string, value int) {
	t.Helper()
	testenv.Management(t, s.AMQPURL).Policy("limits", ".*", map[string]any{setting: value}, false)
	testenv.Eventually(t, 20*time.Second, func() error {
		found, err := s.Topology.Policies(t.Context(), s.ManagementURL, s.AMQPURL)
		if err == nil && len(found) < 2 {
			err = fmt.Errorf("in force: %v", found)
		}
		return err
	})
}

func TestDoctorReportsThatItChecksNoPolicies(t *testing.T) {
	t.Parallel()
	finding, err := checkPolicies(t.Context(), Target{})
	const want = "not checked, because RABBITMQ_MANAGEMENT_URL is not set"
	if err != nil || finding.Verdict != "" || finding.Detail != want {
		t.Errorf("got %+v, %v", finding, err)
	}
}
