#!/bin/sh
# Checks the alert rules and runs their tests: promtool must be on PATH, or named by PROMTOOL.
set -eu
here=$(dirname "$0")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# promtool wants the rules as Prometheus has them: what stands below `spec:`, two columns further left.
sed '1,/^spec:/d; s/^  //' "$here"/../*/components/monitoring/prometheusrule.yaml > "$work/alerts.yaml"
cp "$here/alerts_test.yaml" "$work/"
"${PROMTOOL:-promtool}" check rules "$work/alerts.yaml"
"${PROMTOOL:-promtool}" test rules "$work/alerts_test.yaml"
