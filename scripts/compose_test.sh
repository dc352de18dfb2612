#!/usr/bin/env bash
# Brings docker-compose.yml up as the README says and places orders. Meanwhile it kills every process of the service,
# then the broker, and balances the ledger each time. It uses its own Compose project and ports, so it can run beside
# yours.
#
#   scripts/compose_test.sh [POSTGRES_TAG [RABBITMQ_TAG]]     with other servers than in the file: 15 3.13-management
#
# Needs Docker with Compose 2.20 or newer. SMOKE_ORDERS (800) sets the number of orders. SMOKE_KEEP=1 leaves the stack
# running.
set -euo pipefail
cd "$(dirname "$0")/.."

orders=${SMOKE_ORDERS:-800}
export COMPOSE_PROJECT_NAME=shop-smoke COMPOSE_PROFILES= COMPOSE_MENU=0
export API_PORT=${API_PORT:-18080} CONSOLE_PORT=${CONSOLE_PORT:-18090} POSTGRES_PORT=${POSTGRES_PORT:-15433}
export AMQP_PORT=${AMQP_PORT:-15674} RABBITMQ_MANAGEMENT_PORT=${RABBITMQ_MANAGEMENT_PORT:-15675}
# A password may be any text.
export POSTGRES_PASSWORD='p@ss/w:1' APP_PASSWORD='ab/cd+e=' RABBITMQ_PASSWORD='p@ss#%41?' AMQP_APP_PASSWORD='&x=[1]%'
scratch=$(mktemp -d)
files=(-f docker-compose.yml)
replicas=(--scale relay=2 --scale consumer=3)

compose() { docker compose "${files[@]}" "$@"; }
say() { printf '\n== %s\n' "$*"; }

# use SERVICE IMAGE sets another image for a service.
use() {
  printf 'services: {%s: {image: "%s"}}\n' "$1" "$2" >"$scratch/$1.yml"
  files+=(-f "$scratch/$1.yml")
}

finish() {
  local status=$?
  if [ "$status" != 0 ]; then
    say 'state and logs of the containers'
    compose ps --all || true
    compose logs --tail 40 || true
  fi
  [ -n "${SMOKE_KEEP:-}" ] || compose --profile '*' down --volumes --remove-orphans --timeout 5 >/dev/null 2>&1 || true
  rm -rf "$scratch"
  exit "$status"
}

up() { compose up --wait --wait-timeout 180 "${replicas[@]}" "$@"; }

query() { compose exec -T postgres psql -U shop -d shop -Atc "$1"; }

# expect WHAT WANT GOT
expect() { [ "$2" = "$3" ] || { echo "$1: want $2, got $3"; return 1; }; }

# healthy waits until every container is healthy. `up --wait` would give up at once: without their broker the consumers
# are unhealthy.
healthy() {
  local try states
  for try in $(seq 120); do
    states=$(compose ps --format '{{.Health}}' | sort -u)
    [ "$states" = healthy ] && return
    sleep 1
  done
  echo "not all containers are healthy after $try s: $states"
  return 1
}

# load ORDERS RATE places orders and balances the ledger. Its exit status is the ledger's verdict.
load() { compose run --rm -T --no-deps load "--attach=http://api:8080" "--orders=$1" "--rate=$2"; }

[ -z "${1:-}" ] || use postgres "postgres:$1"
[ -z "${2:-}" ] || use rabbitmq "rabbitmq:$2"
compose --profile '*' down --volumes --remove-orphans --timeout 5 >/dev/null 2>&1 || true
trap finish EXIT

say 'first start'
compose --profile load build
began=$SECONDS
up
echo "everything is healthy after $((SECONDS - began)) s"
compose exec -T postgres postgres --version
compose exec -T rabbitmq rabbitmqctl version

say 'the processes run without rights'
for process in api relay consumer console; do
  mapfile -t ids < <(compose ps -q "$process")
  for id in "${ids[@]}"; do
    expect "$process" '65532:65532 true [ALL]' "$(
      docker inspect -f '{{.Config.User}} {{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}}' "$id"
    )"
  done
done
expect 'replicas of relay and consumer' '2 3' "$(compose ps -q relay | wc -l) $(compose ps -q consumer | wc -l)"
expect 'logins' 'shop_api shop_consumer shop_operator shop_relay' \
  "$(query "SELECT string_agg(DISTINCT usename, ' ' ORDER BY usename) FROM pg_stat_activity
            WHERE application_name LIKE 'shop %'")"

say "$orders orders while all relays, all consumers and the API are killed"
mapfile -t processes < <(compose ps -q api relay consumer)
load "$orders" 40 >"$scratch/load" 2>&1 &
load=$!
until grep -q '[1-9][0-9]* placed' "$scratch/load"; do
  kill -0 "$load" || { cat "$scratch/load"; exit 1; }
  sleep 0.2
done
sleep 2
docker kill "${processes[@]}" >/dev/null
kill -0 "$load" || { cat "$scratch/load"; echo 'the load ended before the kill'; exit 1; }
sleep 1
docker start "${processes[@]}" >/dev/null
wait "$load" || { cat "$scratch/load"; exit 1; }
sed -n '/Ledger/,$p' "$scratch/load"
healthy

# By now the relay has connected too. The console connects only at times.
expect 'logins at the broker' 'shop-consumer shop-relay' \
  "$(compose exec -T rabbitmq rabbitmqctl -q list_connections user |
    grep ^shop | grep -v console | sort -u | paste -sd ' ')"

say 'an order while the broker is down'
broker=$(compose ps -q rabbitmq)
docker kill "$broker" >/dev/null
id=0190c0de-0000-7000-8000-000000000001
placed=$(curl -fsS -H 'Content-Type: application/json' "http://127.0.0.1:$API_PORT/orders.v1.OrderService/PlaceOrder" \
  -d "{\"orderId\":\"$id\",\"customerId\":\"ann\",\"lines\":[{\"sku\":\"nothing\",\"quantity\":1}]}")
echo "$placed"
docker start "$broker" >/dev/null
healthy
load 200 60 | sed -n '/Ledger/,$p'
expect 'the order that was placed meanwhile' rejected "$(query "SELECT status FROM orders WHERE id = '$id'")"
printf '\nsmoke passed\n'
