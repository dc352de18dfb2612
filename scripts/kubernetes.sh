#!/usr/bin/env bash
# Renders deploy/kubernetes and checks every object against the schemas of Kubernetes and of the extensions that the
# examples need: KEDA, the Gateway API, the Prometheus Operator.
#
#   scripts/kubernetes.sh
#
# Needs only Go. The schemas come from the module proxy; the modules are not built.
set -euo pipefail
cd "$(dirname "$0")/.."

# folder_of MODULE@VERSION prints the module's folder in Go's cache.
folder_of() { go mod download -json "$1" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p'; }

kubernetes=$(folder_of sigs.k8s.io/kubectl-validate@v0.0.4)/pkg/openapiclient/builtins/1.30
keda=$(folder_of github.com/kedacore/keda/v2@v2.21.0)/config/crd/bases
gateway=$(folder_of sigs.k8s.io/gateway-api@v1.6.3)/config/crd/standard
prometheus=$(folder_of github.com/prometheus-operator/prometheus-operator@v0.85.0)/example/prometheus-operator-crd
examples=(deploy/kubernetes/*/kustomization.yaml)
folders=("${examples[@]%/kustomization.yaml}")
go -C tools run ./kubecheck "$kubernetes" "$keda:$gateway:$prometheus" "${folders[@]/#/../}"
