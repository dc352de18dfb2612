package architecture

func init() {
	withoutAMQP = append(withoutAMQP, "internal/operations")
	allow(map[string][]string{
		"internal/app":     {"internal/operations"},
		"internal/orders":  {"internal/operations"},
		"internal/console": {"internal/gen/shop/operations/v1", "internal/operations"},
		"internal/operations": {
			"internal/bounds", "internal/changes", "internal/deadletter", "internal/gen/idempotency/v1",
			"internal/gen/shop/operations/v1", "internal/gen/shop/operations/v1/operationsv1connect",
			"internal/inbox", "internal/messaging", "internal/outbox", "internal/postgres", "internal/unary",
		},
		"internal/dev/chaos/victim": {
			"internal/changes", "internal/dev/probe", "internal/operations", "internal/rpcserver",
		},
	})
}
