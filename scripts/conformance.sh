#!/usr/bin/env bash
# Runs Connect's conformance suite against the API: all of it over HTTP, its unary cases over RabbitMQ. Fails if a
# case fails that is not in conformance/*-known-failing.txt, and if one that is there passes. Needs the servers in the
# environment, as `stack` gives them.
#
#   scripts/conformance.sh [FLAG OF THE RUNNER...]
set -euo pipefail
cd "$(dirname "$0")/.."
go -C conformance build -o ../.stack/bin/conformance .
go -C conformance build -o ../.stack/bin/connectconformance connectrpc.com/conformance/cmd/connectconformance
go run ./cmd/shop migrate

failed=()
# suite NAME SERVER... runs the cases of one transport.
suite() {
  local name=$1 began=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  .stack/bin/connectconformance --mode server --conf "conformance/$name.yaml" \
    --known-failing "@conformance/$name-known-failing.txt" "${flags[@]}" -- .stack/bin/conformance "$@" || failed+=("$name")
  echo "$name took $((SECONDS - began)) s"
}

flags=("$@")
suite http
flags+=(--max-servers 1) # all replicas take from the same queue
suite queue queue
if [ ${#failed[@]} -gt 0 ]; then
  printf '\nnot as expected: %s\n' "${failed[*]}"
  exit 1
fi
