#!/bin/sh
# Builds every Kustomization, and holds what comes out to Kubernetes' own schemas: unknown fields are errors.
#
# Custom resources are built, and their schemas are not known here: the cluster has them (kubectl apply --dry-run=server).
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
find . -name kustomization.yaml -not -path './.git/*' -exec grep -l '^kind: Kustomization$' {} + | sort >"$work/all"
while read -r file; do
  folder=$(dirname "$file")
  kubectl kustomize "$folder" >"$work/built.yaml"
  ${VALIDATE:-kubernetes-validate} --strict --quiet --no-warn "$work/built.yaml"
  echo "$folder: $(grep -c '^kind:' "$work/built.yaml") objects"
done <"$work/all"
