//go:build !failpoints

package failpoint

// Hit does nothing: it is compiled away unless the build tag failpoints is set.
func Hit(string) {}
