#!/usr/bin/env bash
# Runs the tests of the packages that use Postgres once under each of several server settings that a database's operator
# may have chosen. Prints a line for each setting; exits 1 if tests failed under any. Each takes minutes. Not part of
# CI.
#
#   scripts/test_settings.sh [NAME=VALUE...]
#
# Needs the servers in the environment, as `stack --profile test` sets them. It changes the server at POSTGRES_URL by
# ALTER SYSTEM, and reverts that in the end, also after Ctrl-C. Servers that tests start themselves keep their settings.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# = 0 ]; then
  set -- default_transaction_isolation='repeatable read' default_transaction_isolation=serializable \
    client_encoding=LATIN1 lock_timeout=1s statement_timeout=5s idle_in_transaction_session_timeout=10s \
    plan_cache_mode=force_generic_plan TimeZone=Asia/Kathmandu
fi
logs=.stack/settings
mkdir -p "$logs"

# Without the tests that kill processes for minutes, and the clients in other languages, which see no database.
packages=$(grep -rlE 'testenv\.(Postgres|PostgresURL)\(' --include=*_test.go internal migrations |
  xargs -n1 dirname | sort -u | grep -vE '^internal/(chaos|testenv)$|/clients$' | sed 's,^,./,')

# on_server SQL... runs each statement outside of a transaction, then makes the server reload its settings.
on_server() {
  local sql args=()
  for sql in "$@" 'SELECT pg_reload_conf()'; do
    args+=(-c "$sql")
  done
  psql -X -q -v ON_ERROR_STOP=1 -d "$POSTGRES_URL" "${args[@]}" >/dev/null
}

name=
undo() { [ -z "$name" ] || on_server "ALTER SYSTEM RESET $name"; }
trap undo EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

failed=0
for setting in "$@"; do
  name=${setting%%=*} value=${setting#*=}
  log=$logs/$(tr -c 'A-Za-z0-9\n' _ <<<"$setting").log
  on_server "ALTER SYSTEM SET $name = '$value'"
  began=$SECONDS
  # shellcheck disable=SC2086 # one word per package
  if go test -count=1 -timeout 10m $packages >"$log" 2>&1; then
    echo "ok    $setting  $((SECONDS - began)) s"
  else
    failed=1
    echo "FAIL  $setting  $((SECONDS - began)) s  $(grep -c '^--- FAIL' "$log" || true) tests, see $log"
  fi
  undo
  name=
done
exit $failed
