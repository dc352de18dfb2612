#!/usr/bin/env bash
# Installs the npm packages of folders from their lock files, unless they are up to date. Needs Node and npm, which
# scripts/need.sh installs where it can.
#
#   scripts/packages.sh FOLDER...
#
# If PACKAGES_FROM is another checkout with the same packages, they are copied from there, and npm is not asked.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/need.sh npm nodejs npm

# same FILE FILE reports whether two lock files list the same packages. A service and its template differ in their name.
same() { [ -s "$2" ] && cmp -s <(grep -v '"name":' "$1") <(grep -v '"name":' "$2"); }

for folder in "$@"; do
  # The installed tree contains a copy of the lock file that it was made from.
  lock=$folder/package-lock.json installed=$folder/node_modules
  if same "$lock" "$installed/.made-from"; then
    continue
  fi
  other=${PACKAGES_FROM:-.}/$installed
  if same "$lock" "$other/.made-from"; then
    rm -rf "$installed"
    cp -a "$other" "$installed"
  else
    (cd "$folder" && npm ci --prefer-offline --no-fund --no-audit)
  fi
  cp "$lock" "$installed/.made-from"
done
