#!/bin/sh
# The image's entry point. The first word train, serve or health selects one of our commands; any other word is a
# program of the image. Each command replaces this shell, so that it gets the signals.
set -eu

first_process() { tr '\0' '\n' </proc/1/cmdline; } # the arguments of process 1, one per line

case "${1:-}" in
train)
    shift
    exec python /app/train_job/run.py "$@"
    ;;
serve) # without words or with settings: our service; otherwise Ray's own commands, such as deploy and status
    shift
    case "${1:-}" in
    "") exec serve run serve_app:app ;;
    *=*) exec serve run serve_app:build_app "$@" ;;
    *) exec serve "$@" ;;
    esac
    ;;
health) # checks the service, if this container runs it; with `docker run --init`, process 1 is Docker's own
    first_process | grep -qE '^(serve|serve_app:.*)$' || exit 0
    host=$(first_process | sed -n 's/^host=//p')
    port=$(first_process | sed -n 's/^port=//p')
    host=${host:-${GPT_HOST:-127.0.0.1}}
    [ "$host" != 0.0.0.0 ] || host=127.0.0.1
    wget --quiet --no-proxy --timeout=5 --tries=1 --output-document=/dev/null \
        "http://$host:${port:-${GPT_PORT:-8000}}/health" || exit 1 # Docker gives wget's own codes other meanings
    exit
    ;;
esac
if ! command -v "${1:-}" >/dev/null; then
    echo "error: '${1:-}' is not a program; expected train, serve, ray, health or a program of the image" >&2
    exit 2
fi
exec "$@"
