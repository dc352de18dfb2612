#!/usr/bin/env bash
# Builds the console into the Go package that embeds it. With a folder it builds there, to compare the committed files
# with the sources.
#
#   scripts/console.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/packages.sh web
out=$(realpath -m "${1:-internal/console/dist}")
web/node_modules/.bin/tsc -p web/console
cd web
node_modules/.bin/vite build --config console/vite.config.ts --outDir "$out" --emptyOutDir --logLevel warn
