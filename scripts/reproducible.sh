#!/usr/bin/env bash
# Builds the last commit twice, in two folders, once with the present build cache of Go and once with an empty one, and
# compares the bytes.
#
#   scripts/reproducible.sh VERSION
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for folder in one another/one; do
  mkdir -p "$scratch/$folder"
  git archive HEAD | tar -x -C "$scratch/$folder"
done
make -s -C "$scratch/one" release VERSION="$1"
GOCACHE=$scratch/cache make -s -C "$scratch/another/one" release VERSION="$1"
cmp "$scratch/one/bin/shop" "$scratch/another/one/bin/shop"
sha256sum <"$scratch/one/bin/shop" | sed "s|-|bin/shop $1, twice|"
