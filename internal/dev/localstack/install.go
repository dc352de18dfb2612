//go:build unix

package localstack

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// installScript installs Debian packages ("$@") for use by a developer, not as
// services of the machine:
//   - Packages must not start services now. policy-rc.d (see invoke-rc.d(8)) forbids
//     it, and exists only during the installation.
//   - They must not start services at the next boot either.
//   - The postgresql package must not make a cluster in /var/lib. A file of
//     postgresql-common configures that, so install that package first. The script
//     reverts the setting at the end.
const installScript = `set -eu
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
clusters=/etc/postgresql-common/createcluster.conf
restore() {
	if [ -n "${placed_policy:-}" ]; then rm -f "$policy"; fi
	if [ -n "${placed_clusters:-}" ]; then sed -i '/# localstack$/d' "$clusters"; fi
}
trap restore EXIT
trap 'exit 1' HUP INT TERM
if [ ! -e "$policy" ]; then
	placed_policy=yes
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
fi
apt() { apt-get -qq -o DPkg::Lock::Timeout=120 "$@"; }
apt update
case " $* " in *" postgresql "*)
	apt install -y --no-install-recommends postgresql-common
	if ! grep -q '^create_main_cluster' "$clusters"; then
		placed_clusters=yes
		echo 'create_main_cluster = false # localstack' >>"$clusters"
	fi
esac
apt install -y --no-install-recommends "$@"
if [ -d /run/systemd/system ]; then
	for package in "$@"; do systemctl disable "$package" || true; done
fi
`

// Require returns the path of a program. If it is missing, Require installs its Debian package as [Join] installs the
// servers.
func Require(ctx context.Context, log io.Writer, program, debianPackage string) (path string, err error) {
	find := func() []string {
		path = firstExecutable(append(inPath(program), filepath.Join("/usr/sbin", program)))
		if path == "" {
			return []string{debianPackage}
		}
		return nil
	}
	if len(find()) == 0 {
		return path, nil
	}
	if err := install(ctx, log, find); err != nil {
		return "", err
	}
	if len(find()) > 0 {
		return "", fmt.Errorf("installed %s, but there is no %s", debianPackage, program)
	}
	return path, nil
}

// install installs the missing packages on Debian and its relatives if this process is
// root or can become root without a password. Otherwise its error contains the command
// to run.
func install(ctx context.Context, log io.Writer, missing func() []string) error {
	// Parallel test binaries miss the same programs. The lock belongs to the user and
	// not to the checkout, because packages belong to the machine.
	path := filepath.Join(os.TempDir(), fmt.Sprintf("localstack-install-%d.lock", os.Geteuid()))
	lock, err := waitLock(ctx, path, lockExclusive)
	if err != nil {
		return err
	}
	defer lock.unlock()
	packages := missing()
	if len(packages) == 0 {
		return nil // another process installed them meanwhile
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return missingError(packages)
	}
	argv := append([]string{"/bin/sh", "-c", installScript, "sh"}, packages...)
	if os.Geteuid() != 0 {
		if exec.CommandContext(ctx, "sudo", "-n", "true").Run() != nil {
			return missingError(packages)
		}
		argv = append([]string{"sudo", "-n"}, argv...)
	}
	fmt.Fprintf(log, "localstack: installing %s with apt-get\n", strings.Join(packages, " and "))
	// Do not bind it to ctx: a killed dpkg leaves a package database that needs repair.
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = "/"
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("install %s: %w\n%s\n%w", strings.Join(packages, " and "), err, out, missingError(packages))
	}
	return nil
}

// missingError contains the exact command for this system.
func missingError(packages []string) error {
	return fmt.Errorf("%s not installed: run  %s  or set %s and %s to running servers",
		strings.Join(packages, " and "), installCommand(packages), postgresVar, amqpVar)
}

func installCommand(packages []string) string {
	manager, names := "sudo apt-get install --no-install-recommends", packages
	switch {
	case runtime.GOOS == "darwin":
		manager, names = "brew install", renamed(packages, "postgresql", "postgresql@17", "rabbitmq-server", "rabbitmq")
	case has("dnf"):
		manager, names = "sudo dnf install", renamed(packages, "postgresql", "postgresql-server")
	}
	return manager + " " + strings.Join(names, " ")
}

func has(program string) bool {
	_, err := exec.LookPath(program)
	return err == nil
}

// renamed applies the pairs of old and new names to whole elements.
func renamed(names []string, pairs ...string) []string {
	result := make([]string, len(names))
	for i, name := range names {
		result[i] = name
		for p := 0; p < len(pairs); p += 2 {
			if name == pairs[p] {
				result[i] = pairs[p+1]
			}
		}
	}
	return result
}
