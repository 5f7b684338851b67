#!/bin/sh
# Waits half a minute until a Job's pod runs; says otherwise what keeps it, in the cluster's own words.
#
#     sh started.sh NAMESPACE JOB
set -eu
namespace=$1
job=$2

pods() { kubectl --namespace "$namespace" get pods --selector "job-name=$job" --output "jsonpath=$1"; }

for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
  phase=$(pods '{.items[*].status.phase}')
  case $phase in *Running* | *Succeeded* | *Failed*) exit 0 ;; esac
  sleep "${JOB_POLL_SECONDS:-2}"
done
echo "$job: its pod does not run yet. The last that the cluster says of it:" >&2
for name in "$job" $(pods '{.items[*].metadata.name}'); do
  kubectl --namespace "$namespace" get events --field-selector "involvedObject.name=$name" --sort-by=.lastTimestamp \
    --output 'jsonpath={range .items[*]}{.reason}: {.message}{"\n"}{end}' | tail -n 2 >&2
done
# Without a pod nothing will come of it; one that waits may be pulling its image.
[ -n "$phase" ]
