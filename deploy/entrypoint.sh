#!/bin/sh
# What the image's first word means: train, serve and health are ours, anything else is a program of the image.
# Each takes this shell's place, so that signals reach it.
set -eu

first_process() { tr '\0' '\n' </proc/1/cmdline; } # its words, one per line

case "${1:-}" in
train)
    shift
    exec python /app/train_job/run.py "$@"
    ;;
serve) # settings or nothing: our service; otherwise Ray's own commands, such as deploy and status
    shift
    case "${1:-}" in
    "") exec serve run serve_app:app ;;
    *=*) exec serve run serve_app:build_app "$@" ;;
    *) exec serve "$@" ;;
    esac
    ;;
health) # of the service, if that is what this container runs; `docker run --init` puts its own process before it
    first_process | grep -qE '^(serve|serve_app:.*)$' || exit 0
    host=$(first_process | sed -n 's/^host=//p')
    port=$(first_process | sed -n 's/^port=//p')
    host=${host:-${GPT_HOST:-127.0.0.1}}
    [ "$host" != 0.0.0.0 ] || host=127.0.0.1
    wget --quiet --no-proxy --timeout=5 --tries=1 --output-document=/dev/null \
        "http://$host:${port:-${GPT_PORT:-8000}}/health" || exit 1 # wget's own codes mean other things to Docker
    exit
    ;;
esac
if ! command -v "${1:-}" >/dev/null; then
    echo "error: '${1:-}' is no program; expected train, serve, ray, health or a program of the image" >&2
    exit 2
fi
exec "$@"
