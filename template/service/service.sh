#!/usr/bin/env bash
# Has systemd run the service of this folder: `sudo make install-service`, `sudo make uninstall-service`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
UNITS=${UNITS:-/etc/systemd/system} # where they go

die() {
  printf '%s\n' "$*" >&2
  exit 1
}

names() { cd "$here" && ls -- *.service *.timer; }

write() {
  local folder=${here%/*} name
  case $folder in *[!A-Za-z0-9/._-]*) die "systemd needs a path of plain letters: move the repository from $folder" ;; esac
  for name in $(names); do
    sed "s|@FOLDER@|$folder|g" "$here/$name" >"$UNITS/$name"
  done
}

root_and_systemd() {
  [ "$(id -u)" = 0 ] || die "Only root can do that: sudo make $1"
  [ -d /run/systemd/system ] || die "systemd does not run here: 'make up' serves without it, until the next reboot of the engine."
}

case ${1:-} in
write) write ;;
install)
  root_and_systemd install-service
  command -v docker >/dev/null || die "The units are for Docker, which is not here: Podman has its own way, Quadlet."
  write
  systemctl daemon-reload
  # shellcheck disable=SC2046 # names without spaces
  systemctl enable --now $(names | grep -v -- -watch.service)
  ;;
uninstall)
  root_and_systemd uninstall-service
  # shellcheck disable=SC2046
  systemctl disable --now $(names | grep -v -- -watch.service)
  for name in $(names); do rm -f "$UNITS/$name"; done
  systemctl daemon-reload
  ;;
*) die "usage: service.sh write|install|uninstall" ;;
esac
