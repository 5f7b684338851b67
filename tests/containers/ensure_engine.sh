#!/bin/sh
# Starts a Docker engine of one's own, or stops it again; nothing of an engine that is already there is touched.
#
#   ensure_engine.sh start RUN STATE    prints the DOCKER_HOST to use
#   ensure_engine.sh stop RUN STATE
#
# RUN holds the socket and the log and is made anew; STATE holds images and layers, and the next engine finds them
# there. The engine has no bridge: builds and containers use --network=host or none.
set -eu

command=$1 run=$2 state=$3

case "$command" in
start)
    mkdir -p "$run" "$state"
    # On a busy machine dockerd gives up on its containerd after 15 s: then once more.
    for _ in 1 2 3; do
        # Left behind by an engine that was killed, whose number another process may have by now.
        rm -f "$run/docker.pid"
        setsid dockerd --host "unix://$run/docker.sock" --pidfile "$run/docker.pid" --exec-root "$run/exec" \
            --data-root "$state" --storage-driver overlay2 --bridge none --iptables=false --ip6tables=false \
            </dev/null >"$run/dockerd.log" 2>&1 &
        daemon=$! tries=0
        until DOCKER_HOST="unix://$run/docker.sock" docker version >/dev/null 2>&1; do
            tries=$((tries + 1))
            [ "$tries" -lt 300 ] || break 2
            kill -0 "$daemon" 2>/dev/null || continue 2
            sleep 0.2
        done
        echo "unix://$run/docker.sock"
        exit
    done
    echo "ensure_engine.sh: dockerd did not start: $(tail -n 1 "$run/dockerd.log")" >&2
    exit 1
    ;;
stop)
    if [ -s "$run/docker.pid" ]; then
        pid=$(cat "$run/docker.pid")
        kill "$pid"
        while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
        # The daemon leaves its network namespaces mounted.
        umount "$run"/exec/netns/* 2>/dev/null || true
    fi
    ;;
*)
    echo "usage: ensure_engine.sh start|stop RUN STATE" >&2
    exit 2
    ;;
esac
