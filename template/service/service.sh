#!/usr/bin/env bash
# Has systemd run the service of this folder: `sudo make install-service`, `sudo make uninstall-service`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${here%/*}
UNITS=${UNITS:-/etc/systemd/system}         # where they go
QUADLETS=${QUADLETS:-/etc/containers/systemd} # and Podman's
GENERATOR=/usr/lib/systemd/system-generators/podman-system-generator

die() {
  printf '%s\n' "$*" >&2
  exit 1
}

# Docker, or Podman where that is all there is, also by Docker's name; ENGINE=podman decides.
engine() {
  if [ -n "${ENGINE:-}" ]; then
    echo "$ENGINE"
  elif command -v docker >/dev/null && ! docker --version 2>/dev/null | grep -qi podman; then
    echo docker
  elif command -v podman >/dev/null; then
    echo podman
  else
    die "Neither Docker nor Podman is here: install one of them."
  fi
}

names() { cd "$here" && ls -- *.service *.timer; }
units() { names | grep -v -- -watch.service; }
project=$(names | sed -n 's/-watch.timer$//p')
quadlets=("$project-fetch.container" "$project.container")

write() {
  local name
  for name in $(names); do
    sed "s|@FOLDER@|$folder|g" "$here/$name" >"$UNITS/$name"
  done
}

write_quadlets() { # model-fetch's image, TEI's
  local name
  mkdir -p "$QUADLETS"
  for name in "${quadlets[@]}"; do
    sed "s|@FOLDER@|$folder|g; s|@FETCH_IMAGE@|$1|; s|@TEI_IMAGE@|$2|" "$here/quadlet/$name" >"$QUADLETS/$name"
  done
}

plain_folder() {
  case $folder in *[!A-Za-z0-9/._-]*) die "systemd needs a path of plain letters: move the repository from $folder" ;; esac
}

root_and_systemd() {
  [ "$(id -u)" = 0 ] || die "Only root can do that: sudo make $1"
  [ -d /run/systemd/system ] || die "systemd does not run here: 'make up' serves without it, until the next reboot of the engine."
}

# What serves goes on until the model is there.
install_quadlets() {
  local images fetch="$project-fetch.service" server="$project.service"
  [ -x "$GENERATOR" ] || die "This Podman has no Quadlet: 4.4 or newer has."
  images=$(bash "$folder/scripts/one_machine.sh" podman_images) || exit 1
  # shellcheck disable=SC2086 # two names without spaces
  write_quadlets $images
  systemctl daemon-reload
  if systemctl restart "$fetch"; then
    systemctl restart "$server"
  else
    systemctl start --no-block "$server"
    die "The model was not fetched yet: journalctl --unit $fetch says why. It is tried again every 30 s."
  fi
}

case ${1:-} in
write) plain_folder && write ;;
write_quadlets) plain_folder && "$@" ;;
install)
  root_and_systemd install-service
  plain_folder
  case $(engine) in
  docker)
    write
    systemctl daemon-reload
    # shellcheck disable=SC2046 # names without spaces
    systemctl enable --now $(units) ||
      die "It does not serve yet: journalctl --unit $(units | head -n 1) says why. It is tried again every 30 s."
    ;;
  podman) install_quadlets ;;
  *) die "ENGINE=$ENGINE is neither docker nor podman." ;;
  esac
  ;;
uninstall)
  root_and_systemd uninstall-service
  for name in $(units); do
    if [ -e "$UNITS/$name" ]; then systemctl disable --now "$name"; fi
  done
  for name in "${quadlets[@]}"; do
    if [ -e "$QUADLETS/$name" ]; then systemctl stop "${name%container}service" && rm "$QUADLETS/$name"; fi
  done
  for name in $(names); do rm -f "$UNITS/$name"; done
  systemctl daemon-reload
  ;;
*) die "usage: service.sh write|write_quadlets|install|uninstall" ;;
esac
