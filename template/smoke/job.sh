#!/bin/sh
# Waits until a Job is complete or failed, saying what its pod does meanwhile; then what it printed.
#
#     sh smoke/job.sh NAMESPACE JOB
#
# Ends with 0 when the Job completed, else with 1. The Job's own activeDeadlineSeconds ends the wait.
set -eu
namespace=$1
job=$2

of() { kubectl --namespace "$namespace" get job "$job" --output "jsonpath=$1"; }

# Kubernetes fails the Job at its deadline; a minute later nobody does.
end=$(($(date +%s) + $(of '{.spec.activeDeadlineSeconds}') + 60))
before=
while :; do
  conditions=$(of '{.status.conditions[?(@.status=="True")].type}')
  case " $conditions " in
    *" Complete "*) code=0 && break ;;
    *" Failed "*) code=1 && break ;;
  esac
  if [ "$(date +%s)" -ge "$end" ]; then
    echo "$job: neither complete nor failed at its deadline" >&2
    code=1 && break
  fi
  now=$(kubectl --namespace "$namespace" get pods --selector "job-name=$job" --no-headers | awk '{print $3}')
  if [ "$now" != "$before" ]; then
    echo "$job: ${now:-no pod yet}" >&2
    before=$now
  fi
  sleep "${JOB_POLL_SECONDS:-2}"
done
kubectl --namespace "$namespace" logs "job/$job" || code=1
if [ "$code" != 0 ]; then
  of '{range .status.conditions[?(@.type=="Failed")]}{.reason}: {.message}{"\n"}{end}' >&2
fi
exit "$code"
