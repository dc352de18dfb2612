#!/usr/bin/env bash
# Installs the npm packages of folders as their lock files say, unless they are there. Needs Node and npm, which are taken from apt on Debian when
# missing and allowed.
#
#   scripts/packages.sh FOLDER...
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/need.sh npm nodejs npm
for folder in "$@"; do
  # The installed tree carries a copy of the lock file that it was made from.
  if ! cmp -s "$folder/package-lock.json" "$folder/node_modules/.made-from"; then
    (cd "$folder" && npm ci --no-fund --no-audit)
    cp "$folder/package-lock.json" "$folder/node_modules/.made-from"
  fi
done
