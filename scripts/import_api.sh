#!/usr/bin/env bash
# Copies the API and the events of another service made from this template into apis/, without the packages of the core
# and the operators' API. `make generate` generates their Go code beside that of proto/.
#
#   scripts/import_api.sh SOURCE
#
# SOURCE is a folder such as ../billing/proto, or a git repository such as
# https://github.com/acme/billing.git#subdir=proto,tag=v1.2.0. A second call with the same SOURCE, or with another tag
# of it, replaces the copy. It changes nothing if the result does not build.
set -euo pipefail
cd "$(dirname "$0")/.."

source=${1:?usage: scripts/import_api.sh SOURCE, such as ../billing/proto}
buf=tools/node_modules/.bin/buf
# This service has its own copy of these packages. A second one would register the same names twice, and panic.
core='auth buf google idempotency ops'

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$buf" export "$source" -o "$scratch/export"
for package in $core; do
  rm -rf "${scratch:?}/export/$package"
done

# workspace is what this service will have.
workspace=$scratch/workspace
mkdir "$workspace"
cp -R proto "$workspace"
mkdir -p "$workspace/apis"
[ ! -d apis ] || cp -R apis "$workspace"

origin=$(sed -e 's|//[^/@]*@|//|' -e 's|#.*||' <<<"$source") # without credentials and tag
copied=()
while read -r folder; do
  if [ -e "proto/$folder" ]; then
    echo "import_api: this service has a package proto/$folder, too: rename one of the two" >&2
    exit 1
  fi
  before=$(cat "apis/$folder/SOURCE" 2>/dev/null || true)
  if [ -n "$before" ] && [ "$before" != "$origin" ]; then
    echo "import_api: apis/$folder is a copy from $before: remove it, or rename one of the two packages" >&2
    exit 1
  fi
  rm -rf "${workspace:?}/apis/$folder"
  mkdir -p "$workspace/apis/$folder"
  cp "$scratch/export/$folder"/*.proto "$workspace/apis/$folder"
  echo "$origin" >"$workspace/apis/$folder/SOURCE"
  copied+=("apis/$folder")
done < <(cd "$scratch/export" && find . -name '*.proto' | sed -e 's|^\./||' -e 's|/[^/]*$||' | sort -u)
if [ ${#copied[@]} = 0 ]; then
  echo "import_api: $source has no API of its own" >&2
  exit 1
fi

# The first import adds apis/ to the configuration of buf.
cp buf.yaml buf.gen.yaml "$workspace"
if ! grep -q ' apis$' buf.yaml; then
  awk '/^lint:$/ { print "  # APIs of other services, which scripts/import_api.sh copies."; print "  - path: apis" }
    { sub(/ignore: \[proto\/buf\]/, "ignore: [proto/buf, apis]"); print }' buf.yaml >"$workspace/buf.yaml"
  awk '/^plugins:$/ { print "  - directory: apis" } { print }' buf.gen.yaml >"$workspace/buf.gen.yaml"
fi
"$buf" build "$workspace"

rm -rf apis
cp -R "$workspace/apis" .
cp "$workspace/buf.yaml" "$workspace/buf.gen.yaml" .
printf 'copied to %s\n' "${copied[@]}"
