package architecture

func init() {
	takers = append(takers, "console")
	allow(map[string][]string{
		"internal/app": {"internal/console", "internal/gen/ops/v1/opsv1connect"},
		"internal/console": {
			"internal/bounds", "internal/auth", "internal/deadletter", "internal/gen/ops/v1",
			"internal/gen/ops/v1/opsv1connect", "internal/inbox", "internal/messaging", "internal/ops",
			"internal/outbox", "internal/postgres", "internal/rabbit",
		},
		"internal/gen/ops/v1":              {"internal/gen/auth/v1"},
		"internal/gen/ops/v1/opsv1connect": {"internal/gen/ops/v1"},
	})
}
