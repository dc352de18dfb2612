// Package failpoint kills the process at a named line, for tests of crashes. It is active only in builds with the tag
// failpoints: FAILPOINT=relay.confirmed:3 kills at the third hit of that line.
package failpoint
