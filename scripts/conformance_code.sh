#!/usr/bin/env bash
# Generates conformance/gen under a folder, from the proto files in the module of the conformance suite.
#
#   scripts/conformance_code.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
go -C conformance mod download connectrpc.com/conformance
proto=$(go -C conformance list -m -f '{{.Dir}}' connectrpc.com/conformance)/proto
files=()
for name in config server_compat service; do
  files+=(--path "$proto/connectrpc/conformance/v1/$name.proto")
done
tools/node_modules/.bin/buf generate --template buf.gen.conformance.yaml -o "$1" "$proto" "${files[@]}"
