//go:build !failpoints

package failpoint

// Hit does nothing without the build tag failpoints. The compiler removes the call.
func Hit(string) {}
