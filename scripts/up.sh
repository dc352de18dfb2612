#!/usr/bin/env bash
# Starts the servers and the processes of the service, and leaves them running. `make down` stops them.
set -euo pipefail
cd "$(dirname "$0")/.."
stack=.stack/bin/stack
api=127.0.0.1:${API_PORT:-8080}
# The addresses for probes and scrapes.
api_ops=127.0.0.1:${API_OPS_PORT:-9180} relay_ops=127.0.0.1:${RELAY_OPS_PORT:-9181}
consumer_ops=127.0.0.1:${CONSUMER_OPS_PORT:-9182}
addresses=("$api_ops" "$relay_ops" "$consumer_ops")

# as ROLE prints the database's URL for a session with the rights of that role only.
as() {
  case $POSTGRES_URL in
    *\?*) echo "$POSTGRES_URL&role=$1" ;;
    *) echo "$POSTGRES_URL?role=$1" ;;
  esac
}

eval "$($stack up)"
bin/shop migrate
# Each process gets its own broker user, with only the permissions that the process needs.
password_file=.stack/dev/broker-password
[ -s "$password_file" ] || (umask 077; head -c 24 /dev/urandom | base64 >"$password_file")
password=$(cat "$password_file")
AMQP_USERS_PASSWORD=$password bin/shop topology --declare --users "shop" >/dev/null

# at_broker PROCESS prints the broker's URL for the user of a process; AMQP_PASSWORD has the password.
at_broker() { sed "s|//[^@/]*@|//shop-$1@|" <<<"$AMQP_URL"; }
# One API key for trying the service out; the service keeps only its hash. A key of an older version, with other roles,
# is replaced.
keys=.stack/dev/api-keys key_file=.stack/dev/api-key roles=(customer operator)
# example
roles+=(warehouse)
# /example
if ! grep -qs "^dev:$(IFS=,; echo "${roles[*]}"):" "$keys" || [ ! -s "$key_file" ]; then
  made=$(bin/shop apikey new dev "${roles[@]}")
  (
    umask 077
    awk '$1 == "line:" { print $2 }' <<<"$made" >"$keys"
    awk '$1 == "key:" { print $2 }' <<<"$made" >"$key_file"
  )
fi
export AMQP_PASSWORD=$password TOPOLOGY=given
api_environment=() consumer_environment=()
# durable-calls
# The API signs the callers of durable calls, and the consumer checks them with the same key. Waiting operations still
# need it after a restart.
call_key=.stack/dev/call-key
[ -s "$call_key" ] || (umask 077; head -c 32 /dev/urandom | base64 >"$call_key")
api_environment+=("CALL_KEYS=$(cat "$call_key")") consumer_environment+=("CALL_KEYS=$(cat "$call_key")")
# /durable-calls
# rpc-over-rabbitmq
api_environment+=("AMQP_URL=$(at_broker rpc-server)" RPC_OVER_RABBITMQ=true)
# /rpc-over-rabbitmq
LISTEN=$api OPS_LISTEN=$api_ops POSTGRES_URL=$(as shop_api) API_KEYS_FILE=$keys \
  env "${api_environment[@]}" $stack daemon api -- bin/shop api
OPS_LISTEN=$relay_ops POSTGRES_URL=$(as shop_relay) AMQP_URL=$(at_broker relay) $stack daemon relay -- bin/shop relay
OPS_LISTEN=$consumer_ops POSTGRES_URL=$(as shop_consumer) AMQP_URL=$(at_broker consumer) \
  env "${consumer_environment[@]}" $stack daemon consumer -- bin/shop consumer
# console
console=127.0.0.1:${CONSOLE_PORT:-8090} console_ops=127.0.0.1:${CONSOLE_OPS_PORT:-9190}
LISTEN=$console OPS_LISTEN=$console_ops POSTGRES_URL=$(as shop_operator) AMQP_URL=$(at_broker console) \
  API_KEYS_FILE=$keys $stack daemon console -- bin/shop console
addresses+=("$console_ops")
# /console
for address in "${addresses[@]}"; do
  for try in $(seq 100); do
    if bin/shop healthcheck "http://$address/readyz" 2>/dev/null; then
      continue 2
    fi
    sleep 0.1
  done
  bin/shop healthcheck "http://$address/readyz" || { echo "see .stack/dev/log" >&2; exit 1; }
done

cat <<TEXT

API        http://$api     (Connect, gRPC and gRPC-Web, without TLS)
API key    $(cat "$key_file")     (kept in $key_file)
readiness  of each process: $(printf 'http://%s/readyz ' "${addresses[@]}")
Postgres   $POSTGRES_URL
RabbitMQ   $AMQP_URL   management: $RABBITMQ_MANAGEMENT_URL
logs       .stack/dev/log
TEXT
# console
echo "console    http://$console/console/ (the same API key)"
# /console
# example
order=0190c0de-0000-7000-8000-000000000001
cat <<TEXT

Try it:

  key='X-Api-Key: $(cat "$key_file")' json='Content-Type: application/json'
  curl -d '{"sku":"apple","total":10}' -H "\$key" -H "\$json" http://$api/orders.v1.OrderService/SetStock
  curl -d '{"orderId":"$order","customerId":"ann","lines":[{"sku":"apple","quantity":2}]}' -H "\$key" -H "\$json" \\
    http://$api/orders.v1.OrderService/PlaceOrder
  curl -d '{"orderId":"$order"}' -H "\$key" -H "\$json" http://$api/orders.v1.OrderService/GetOrder

make load places 2,400 orders, for the console to show.
TEXT
# /example
cat <<TEXT

make down stops everything.
TEXT
