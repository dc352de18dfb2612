#!/usr/bin/env bash
# Runs all static checks: Go, protobuf, generated code, alert rules, docker-compose.yml. At the end,
# names the failed checks.
#
#   scripts/lint.sh
#
# Needs Go, Node and promtool (scripts/need.sh installs the last two where it can). Writes nothing but node_modules and
# Go's own caches.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=()

# check NAME COMMAND... runs one check under a heading and records a failure.
check() {
  local name=$1
  shift
  printf '\n== %s\n' "$name"
  if ! "$@"; then
    failed+=("$name")
  fi
}

# example
in_bench() { (cd bench && "$@"); }
# /example
in_conformance() { (cd conformance && "$@"); }
in_tools() { (cd tools && "$@"); }

gofmt_clean() {
  local files
  files=$(gofmt -l .)
  [ -z "$files" ] || { printf 'not formatted: %s\n' $files; return 1; }
}

# main_ref prints the newest commit of the main branch that this clone has or can fetch.
main_ref() {
  git rev-parse -q --verify refs/remotes/origin/main^{commit} ||
    git rev-parse -q --verify refs/heads/main^{commit} ||
    { git fetch -q --depth=1 origin main 2>/dev/null && git rev-parse -q --verify FETCH_HEAD^{commit}; }
}

# git archive extracts the old files: buf's own git input needs a branch, which a CI clone does not have.
breaking() {
  local ref
  if ! ref=$(main_ref); then
    echo 'skipped: there is no main branch to compare with'
    return
  fi
  if ! git cat-file -e "$ref:proto" 2>/dev/null; then
    echo 'skipped: the main branch has no proto folder yet'
    return
  fi
  mkdir "$scratch/main"
  git archive "$ref" buf.yaml $(git ls-tree --name-only "$ref" proto apis) | tar -x -C "$scratch/main"
  "$buf" breaking --against "$scratch/main"
}

generated() {
  local template out
  for template in buf.gen.yaml buf.gen.web.yaml; do
    "$buf" generate --template "$template" -o "$scratch/generated" || return 1
  done
  bash scripts/conformance_code.sh "$scratch/generated" || return 1
  for out in $(sed -n 's/.*out: *\([^,} ]*\).*/\1/p' buf.gen*.yaml | sort -u); do
    if ! diff -r "$scratch/generated/$out" "$out"; then
      echo "$out is out of date: run make generate"
      return 1
    fi
  done
}

# console
console_is_current() {
  bash scripts/console.sh "$scratch/console" || return 1
  if ! diff -r "$scratch/console" internal/console/dist; then
    echo 'internal/console/dist is out of date: run make console'
    return 1
  fi
}
# /console

buf=tools/node_modules/.bin/buf
bash scripts/packages.sh tools web
bash scripts/need.sh promtool prometheus

check 'gofmt' gofmt_clean
check 'go vet' go vet ./...
check 'the program compiles for Windows' env GOOS=windows go build ./...
check 'staticcheck' go tool -modfile=tools/go.mod staticcheck ./...
check 'go.mod is tidy' go mod tidy -diff
# example
check 'bench: go vet' go -C bench vet ./...
check 'bench: staticcheck' in_bench go tool -modfile=../tools/go.mod staticcheck ./...
check 'bench: go.mod is tidy' go -C bench mod tidy -diff
# /example
check 'conformance: go vet' go -C conformance vet ./...
check 'conformance: staticcheck' in_conformance go tool -modfile=../tools/go.mod staticcheck ./...
check 'conformance: go.mod is tidy' go -C conformance mod tidy -diff
check 'web: types' web/node_modules/.bin/tsc -p web --noEmit
check 'tools: go vet' go -C tools vet ./...
check 'tools: staticcheck' in_tools go tool staticcheck ./...
check 'tools: go.mod is tidy' go -C tools mod tidy -diff
check 'docker-compose.yml' go -C tools run ./composecheck ../docker-compose.yml
check 'buf lint' "$buf" lint
check 'buf format' "$buf" format --diff --exit-code
check 'buf breaking, against main' breaking
check 'generated code is current' generated
# console
check 'the built console is current' console_is_current
# /console
check 'prometheus.yml and its alert rules' promtool check config deploy/prometheus/prometheus.yml
check 'alert rules fire as tested' promtool test rules deploy/prometheus/alerts_test.yml

if [ ${#failed[@]} -gt 0 ]; then
  printf '\nfailed: %s\n' "${failed[@]}"
  exit 1
fi
printf '\nall checks passed\n'
