// Package failpoint kills the process at a named line, for the tests of what a crash there may cost. It exists only in builds
// with the tag failpoints: FAILPOINT=relay.confirmed:3 kills at the third hit of that line.
package failpoint
