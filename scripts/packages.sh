#!/usr/bin/env bash
# Installs the npm packages of folders from their lock files, unless they are up to date. Needs Node and npm, which
# scripts/need.sh installs where it can.
#
#   scripts/packages.sh FOLDER...
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/need.sh npm nodejs npm
for folder in "$@"; do
  # The installed tree contains a copy of the lock file that it was made from.
  if ! cmp -s "$folder/package-lock.json" "$folder/node_modules/.made-from"; then
    (cd "$folder" && npm ci --no-fund --no-audit)
    cp "$folder/package-lock.json" "$folder/node_modules/.made-from"
  fi
done
