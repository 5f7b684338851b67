#!/usr/bin/env bash
# Brings the model to /model/current, runs TEI on it behind nginx, and ends as soon as one of them ends.
#
# Its environment holds secrets: it is never printed, and TEI gets the few variables that it needs.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC1091
. "$here/settings.sh"

pin=$here/pin.json
front=/tmp/front # nginx.conf names it too
why=$front/why   # the last words of model-fetch, then of TEI
mount=/mlflow-models
link=/model/current
cache=/cache

say() { printf 'start: %s\n' "$*" >&2; }

# The log's last line is also the reason that Kubernetes shows, and so the LLM gateway.
give_up() { # status, reason
  say "$2"
  printf '%s\n' "$2" 2>/dev/null >"${MODEL_FETCH_TERMINATION_LOG:-/dev/termination-log}" || true
  end "$1"
}

# Processes

nginx_pid='' worker_pid='' # worker: model-fetch, then TEI
serving='' # yes: TEI has been started

end() { # status: what the platform sees
  trap '' TERM INT QUIT
  # Nobody is left to answer to; and model-fetch's journal is right at any moment.
  if [ -n "$worker_pid" ]; then kill -KILL "$worker_pid" 2>/dev/null; fi
  if [ -n "$nginx_pid" ]; then kill -TERM "$nginx_pid" 2>/dev/null; fi
  wait
  exit "$1"
}

# nginx first, so that requests in flight still find TEI.
# shellcheck disable=SC2329 # a trap calls it
drain() {
  trap '' TERM INT QUIT
  say "stopping: requests in flight are finished"
  # From now on no model is listed here, and the LLM gateway's proxy looks every 5 s.
  if [ -n "$serving" ]; then
    rm -f "$front/answers/models.json"
    if [ "$DEPLOYMENT" = component ]; then sleep 5; fi
  fi
  if [ -n "$nginx_pid" ] && kill -QUIT "$nginx_pid" 2>/dev/null; then wait "$nginx_pid"; fi
  if [ -n "$worker_pid" ] && kill -TERM "$worker_pid" 2>/dev/null; then wait "$worker_pid"; fi
  exit 0
}
trap drain TERM INT QUIT

# Waits for the worker; the end of nginx is the end of all.
wait_for_worker() {
  local ended='' status
  wait -n -p ended $worker_pid "$nginx_pid"
  status=$?
  if [ "$ended" = "$nginx_pid" ]; then
    nginx_pid=''
    give_up 1 "nginx ended with $status"
  fi
  worker_pid=''
  return "$status"
}

not_served() { # status, program
  local said
  said=$(tail -n 1 "$why" 2>/dev/null)
  give_up "$(($1 == 0 ? 1 : $1))" "$wanted is not served: $2 ended with $1${said:+: $said}"
}

# Which model

is_model() { [[ $1 =~ ^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$ ]]; }

wanted=$MODEL
if [ "$DEPLOYMENT" = component ]; then
  # The LLM gateway names the model of each pod that it starts.
  wanted=${MODEL_ID:-}
  if [ -n "$wanted" ] && ! is_model "$wanted"; then
    give_up 2 "MODEL_ID is not the name of a model"
  fi
elif [ -n "${MODEL_ID:-}" ] && [ "$MODEL_ID" != "$MODEL" ]; then
  # The platform may lose or keep an old value when it writes its manifests anew.
  say "MODEL_ID is not followed: this image is of $MODEL"
fi

# The way in

health() { printf '{"status":"%s"}\n' "$1" >"$front/answers/health.json"; }

rm -rf "$front"
mkdir -p "$front/answers"
if [ -z "$wanted" ]; then health idle; elif [ "$LOADING_IS_HEALTHY" = yes ]; then health loading; fi
printf '{"object":"list","data":[{"id":"%s","object":"model","created":0,"owned_by":"text-embeddings-inference"}]}\n' \
  "$wanted" >"$front/answers/models.json"
nginx -e stderr -c "$here/nginx.conf" &
nginx_pid=$!

if [ -z "$wanted" ]; then
  say "idle: the LLM gateway has named no model"
  wait_for_worker
fi

# The model

if [ "$wanted" != "$MODEL" ]; then
  say "$wanted is not the pinned model: its newest version is taken, and TEI itself decides on pooling"
  pin=$front/pin.json
  printf '{"model_id":"%s","registered_model":"%s","selector":"latest","version":null,"files":[],"facts":{"architecture":"unknown"}}\n' \
    "$wanted" "${wanted//\//-}" >"$pin"
  kept=()
  for flag in "${FLAGS[@]}"; do
    case $flag in --pooling=* | --max-batch-tokens=*) ;; *) kept+=("$flag") ;; esac
  done
  FLAGS=("${kept[@]}")
fi
export MLFLOW_TRACKING_URI=${MLFLOW_TRACKING_URI:-$DEFAULT_TRACKING_URI}
# What is not in the mount comes from the store behind it: MLflow's artifacts are in JuiceFS, whose
# gateway takes the platform's admin user and password (thinkube df35039, juicefs/12_deploy_mlflow_gateway.yaml).
if [ -z "${AWS_ACCESS_KEY_ID:-}" ] && [ -n "${ADMIN_PASSWORD:-}" ]; then
  export MLFLOW_S3_ENDPOINT_URL=${MLFLOW_S3_ENDPOINT_URL:-$ARTIFACT_STORE}
  export AWS_ACCESS_KEY_ID=$ARTIFACT_STORE_USER AWS_SECRET_ACCESS_KEY=$ADMIN_PASSWORD
fi
fetch=(--pin "$pin" --cache "$cache" --link "$link" --log-format json --termination-log "$why")
if [ -d "$mount" ]; then fetch+=(--mount "$mount"); fi
python3 -m model_fetch "${fetch[@]}" &
worker_pid=$!
wait_for_worker || not_served $? model-fetch

# TEI

# Both refuse a GPU that cannot serve: the one of the image built from source, and the one of Hugging Face.
if command -v require-gpu >/dev/null; then
  tei=(require-gpu text-embeddings-router)
elif [ -x /entrypoint.sh ]; then
  tei=(/entrypoint.sh)
else
  tei=(text-embeddings-router)
fi
# TEI takes flags from variables too, some of which Kubernetes or the platform sets to something else.
environment=()
for name in $(compgen -e); do
  case $name in
  PATH | HOME | LANG | TZ | LOG_LEVEL | RUST_BACKTRACE | LD_LIBRARY_PATH | USE_FLASH_ATTENTION | API_KEY | NVIDIA_* | CUDA_*)
    if [ -n "${!name}" ]; then continue; fi ;;
  esac
  environment+=("--unset=$name")
done
# They are taken away. What stays is never handed on, as in env -i "${environment[@]}": a process's arguments, here the
# API key, are for all to read.
# TEI says on standard error why it ends: the last line of it is kept for the reason.
exec 3> >(while IFS= read -r line; do
  printf '%s\n' "$line" >&2
  if [ -n "$line" ]; then printf '%s\n' "$line" >"$why"; fi
done)
reader_pid=$!
: >"$why"
env "${environment[@]}" "${tei[@]}" --model-id="$link" --served-model-name="$wanted" \
  --hostname=127.0.0.1 --port=8355 "${FLAGS[@]}" 2>&3 3>&- &
worker_pid=$!
exec 3>&-
serving=yes
wait_for_worker
status=$?
wait "$reader_pid"
not_served "$status" TEI
