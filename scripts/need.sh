#!/usr/bin/env bash
# Installs the packages of a missing command, on Debian and Ubuntu as root or with passwordless sudo. Elsewhere it names
# the packages to install.
#
#   scripts/need.sh COMMAND PACKAGE...
set -euo pipefail
command=$1
shift
if command -v "$command" >/dev/null; then
  exit
fi
root=()
if [ "$(id -u)" != 0 ]; then
  root=(sudo -n)
fi
if ! command -v apt-get >/dev/null || { [ "$(id -u)" != 0 ] && ! sudo -n true 2>/dev/null; }; then
  echo "$command is missing: install it (Debian's packages: $*) and run this again." >&2
  exit 1
fi
echo "installing $* for $command" >&2
# Only the programs are needed: services of the packages start neither now nor at the next boot.
"${root[@]}" env DEBIAN_FRONTEND=noninteractive sh -ec '
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    trap "rm -f /usr/sbin/policy-rc.d" EXIT
    printf "#!/bin/sh\nexit 101\n" >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
  fi
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "$@"
  if [ -d /run/systemd/system ]; then
    for package in "$@"; do systemctl disable "$package" 2>/dev/null || true; done
  fi
' sh "$@"
