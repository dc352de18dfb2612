package architecture

func init() {
	drains = append(drains, "internal/rabbitrpc/server.go")
	withoutPgx = append(withoutPgx, "internal/rabbitrpc")
	allow(map[string][]string{
		"cmd/shop": {"internal/rabbitrpc"}, "internal/app": {"internal/rabbitrpc"},
		"internal/rabbitrpc": {"internal/bounds", "internal/rabbit"},
	})
}
