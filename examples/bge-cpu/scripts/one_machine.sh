#!/usr/bin/env bash
# The service on this machine, by compose: `make up`, `make down` and the others call it, and the systemd units.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# From the answers.
MODEL='BAAI/bge-base-en-v1.5, version 3'
SERVED=/model/BAAI-bge-base-en-v1.5/3 # compose.yaml's --model-id
MLFLOW=http://mlflow.mlflow.svc.cluster.local:5000
FETCH_IMAGE=registry.example.com/bge-model-fetch:1.0.0
OWN_IMAGE=registry.example.com/bge-tei:0d124dc9773b-cpu
# Hugging Face's own for this accelerator; empty where there is none.
OFFICIAL_IMAGE=ghcr.io/huggingface/text-embeddings-inference:cpu-1.9.4@sha256:2538ea1c9640d3763b15af668039d24172d063b42337b0c27796fc2be180c78d
GPU=no
STARTS_WITHIN=135 # seconds

die() {
  printf '%s\n' "$*" >&2
  exit 1
}

# A setting of the environment, else of .env, as compose reads them.
setting() { # name, default
  local line
  if [ -n "${!1:-}" ]; then printf '%s' "${!1}"; return; fi
  line=$(sed -n "s/\r$//; s/^ *\(export  *\)\{0,1\}$1=//p" .env 2>/dev/null | tail -n 1)
  case $line in
  \"*) line=${line#\"} line=${line%%\"*} ;;
  \'*) line=${line#\'} line=${line%%\'*} ;;
  *) line=$(printf '%s' "$line" | sed 's/[[:space:]]\{1,\}#.*//; s/[[:space:]]*$//') ;;
  esac
  printf '%s' "${line:-$2}"
}

# Docker Compose v2, Debian's old docker-compose, or Podman's.
engine=docker compose=()
find_compose() {
  if docker compose version >/dev/null 2>&1; then
    compose=(docker compose)
  elif docker-compose version >/dev/null 2>&1; then
    compose=(docker-compose)
  elif command -v podman-compose >/dev/null; then
    engine=podman compose=(podman-compose)
    case $(podman-compose version 2>/dev/null | sed -n 's/.*podman-compose version:* *//p') in
    "" | 0.* | 1.[0-5].* | 1.[0-5])
      die "This podman-compose does not wait for the model before it starts TEI: install 1.6.0 or newer." ;;
    esac
  else
    die "There is no Docker Compose here: install docker-compose-plugin, or podman-compose 1.6.0 or newer."
  fi
  "$engine" info >/dev/null 2>&1 ||
    die "$engine does not answer: start it, or be a user who may use it."
}

# Docker's ports pass the firewall of the host, and no key is asked for.
for_this_machine_alone() {
  local bind
  bind=$(setting BIND 127.0.0.1)
  case $bind in 127.* | localhost | ::1 | "[::1]") return ;; esac
  [ "$(setting OPEN_TO_EVERYONE no)" = yes ] ||
    die "BIND=$bind lets whoever reaches this machine use the service: answer components with api-key, or set OPEN_TO_EVERYONE=yes."
}

check() {
  local problem
  for_this_machine_alone
  find_compose
  problem=$("${compose[@]}" config 2>&1 >/dev/null) || die "compose: $(printf '%s' "$problem" | tail -n 1)"
  [ "$GPU" = no ] || [ "$engine" = podman ] || "$engine" info --format '{{json .Runtimes}}' | grep -q nvidia ||
    die "Docker has no NVIDIA runtime: sudo nvidia-ctk runtime configure --runtime=docker, then restart Docker."
}

has() { "$engine" image inspect "$1" >/dev/null 2>&1; }

# What `make push` wrote down, where it is of what stands here.
pull_pushed() { # image, its name here
  local pushed
  pushed=$(python3 -B scripts/images.py source "$1")
  [ -n "$pushed" ] && "$engine" pull "$pushed" && "$engine" tag "$pushed" "$2"
}

# By what it is built from: an update of the template builds it anew, and a revert has the old one again.
fetch_image() {
  local content
  content=$(python3 -B scripts/images.py tag model-fetch)
  if has "$content" || pull_pushed model-fetch "$content"; then
    "$engine" tag "$content" "$FETCH_IMAGE"
  elif BUILDER=$engine FORCE=1 python3 -B scripts/images.py build model-fetch; then
    return
  elif has "$FETCH_IMAGE"; then
    echo "model-fetch's image could not be built anew (see above): the one that is here is used." >&2
  else
    die "model-fetch's image could not be built: see above."
  fi
}

images() {
  fetch_image
  TEI_IMAGE=$(setting TEI_IMAGE "$OWN_IMAGE")
  export TEI_IMAGE
  if has "$TEI_IMAGE"; then return; fi
  if [ "$TEI_IMAGE" = "$OWN_IMAGE" ]; then
    if pull_pushed tei "$OWN_IMAGE"; then return; fi
    [ -n "$OFFICIAL_IMAGE" ] || die "TEI's image is not here, and Hugging Face has none for cpu: make tei-image."
    TEI_IMAGE=$OFFICIAL_IMAGE
    echo "Your own image of TEI is not here: Hugging Face's serves until 'make tei-image && make up'. README.md says what differs."
    if has "$TEI_IMAGE"; then return; fi
  fi
  "$engine" pull "$TEI_IMAGE" || die "$TEI_IMAGE could not be pulled: see above."
}

state() { "$engine" inspect --format '{{.State.Status}} {{.State.Health.Status}} {{.RestartCount}}' "$1" 2>/dev/null; }

# TEI's container, until it is healthy.
wait_until_healthy() {
  local id end=$((SECONDS + STARTS_WITHIN + 30)) now
  id=$(tei)
  while now=$(state "$id"); do
    case $now in
    "running healthy "*) return ;;
    exited* | dead* | restarting* | *unhealthy*) break ;;
    esac
    [ "$SECONDS" -lt "$end" ] || break
    sleep 1
  done
  die "TEI does not serve (${now:-gone}): $("$engine" logs --tail 1 "$id" 2>&1 | tail -n 1)"
}

tei() { "${compose[@]}" ps --quiet tei 2>/dev/null; }

port_is_ours() {
  local bind port
  bind=$(setting BIND 127.0.0.1) port=$(setting PORT 8355)
  [ "$bind" != 0.0.0.0 ] || bind=127.0.0.1
  case $(state "$(tei)") in running*) return ;; esac
  if (exec 3<>"/dev/tcp/$bind/$port") 2>/dev/null; then
    die "Port $port of $bind is taken by another program: end it, or set PORT to another."
  fi
}

# A container's MLflow is seldom where it is for Kubernetes, or for this shell.
whose_mlflow() {
  [ -n "$(setting COMPOSE_MLFLOW_URI "")" ] ||
    printf ' MLflow was asked at %s: COMPOSE_MLFLOW_URI names another address.' "$MLFLOW"
}

# Beside what serves.
fetch() {
  check
  port_is_ours
  images
  "${compose[@]}" run --rm --no-deps -T model-fetch ||
    die "The model was not fetched: the line above says why. What served before still serves.$(whose_mlflow)"
}

# Changes over at the end: a second or two, and the time that TEI takes to load.
start() {
  fetch
  "${compose[@]}" up --detach --no-build || die "The service did not start: the lines above say why."
  wait_until_healthy
}

up() {
  start
  local address key
  address="http://$(setting BIND 127.0.0.1):$(setting PORT 8355)"
  key=$(setting API_KEY "")
  if [ -n "$key" ]; then export API_KEY="$key"; fi
  python3 -B smoke/smoke.py --url "${address/0.0.0.0/127.0.0.1}" ||
    die "It serves at $address, but not as it should: see above."
  case ,$(setting COMPOSE_PROFILES ""), in
  *,playground,*) echo "A page to try it: http://$(setting BIND 127.0.0.1):$(setting PAGE_PORT 8356)/" ;;
  esac
  echo "Serves $MODEL at $address"
}

# What serves stays; what it served before, and images of before, go.
prune() {
  check
  case $("$engine" inspect --format '{{.State.Status}} {{.Args}}' "$(tei)" 2>/dev/null) in
  "running "*"--model-id=$SERVED "*) ;;
  *) die "The pinned version does not serve here: 'make up' first, else what serves would be removed." ;;
  esac
  KEEP=0 KEEP_HOURS=0 "${compose[@]}" run --rm --no-deps -T model-fetch || die "Old versions were not removed: see above."
  local name kept
  kept=" $FETCH_IMAGE $(python3 -B scripts/images.py tag model-fetch) "
  for name in $("$engine" images --format '{{.Repository}}:{{.Tag}}' "${FETCH_IMAGE%:*}"); do
    case $kept in *" $name "*) ;; *) "$engine" rmi "$name" ;; esac
  done
}

# The same images for Quadlet: their names, once they are here.
podman_images() {
  engine=podman
  images >&2
  local content
  content=$(python3 -B scripts/images.py tag model-fetch)
  if has "$content"; then echo "$content"; else echo "$FETCH_IMAGE"; fi
  echo "$TEI_IMAGE"
}

# What compose refuses, and Quadlet does not.
allowed() {
  for_this_machine_alone
}

# Docker restarts nothing that hangs; the timer of the service calls this.
watch() {
  find_compose
  local id
  for id in $("$engine" ps --quiet --filter health=unhealthy \
    --filter "label=com.docker.compose.project.working_dir=$PWD"); do
    echo "TEI answers no more: it is started anew"
    "$engine" restart --time 10 "$id"
  done
}

case ${1:-} in
up | fetch | start | watch | prune | allowed | podman_images) "$1" ;;
runs) find_compose 2>/dev/null && [ -n "$("${compose[@]}" ps --quiet 2>/dev/null)" ] ;;
stop) find_compose && "${compose[@]}" stop ;;
down) find_compose && "${compose[@]}" down ;;
status) find_compose && "${compose[@]}" ps ;;
marker) find_compose && "${compose[@]}" exec -T tei cat /model/BAAI-bge-base-en-v1.5/3/.model-fetch.json ;;
logs) find_compose && "${compose[@]}" logs --follow ;;
*) die "usage: one_machine.sh up|fetch|start|stop|down|status|logs|marker|runs|watch|prune" ;;
esac
