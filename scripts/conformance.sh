#!/usr/bin/env bash
# Runs Connect's conformance suite against the API. It fails if a
# case fails that conformance/*-known-failing.txt does not list, or if a listed one passes. Needs the servers in the
# environment, as `stack` sets them.
#
#   scripts/conformance.sh [RUNNER_FLAG...]
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
    --known-failing "@conformance/$name-known-failing.txt" "${flags[@]}" -- .stack/bin/conformance "$@" ||
    failed+=("$name")
  echo "$name took $((SECONDS - began)) s"
}

flags=("$@")
suite http
# rpc-over-rabbitmq
# The unary cases over RabbitMQ. All servers consume from the same queue.
flags+=(--max-servers 1)
suite queue queue
# /rpc-over-rabbitmq
if [ ${#failed[@]} -gt 0 ]; then
  printf '\nunexpected results: %s\n' "${failed[*]}"
  exit 1
fi
