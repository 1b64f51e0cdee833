"""Everything that the service uses of Ray's private API, one function each, because Ray has no public way.

Tried with Ray 2.60. `tests/serve_app/test_ray_private.py` says which function another version of Ray breaks.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from ray._private import ray_logging, services, worker
from ray._private.node import Node
from ray.serve._private import api, client
from ray.serve.context import _get_global_client


@contextlib.contextmanager
def dashboard_later() -> Iterator[list[Callable[[], None]]]:
    """Let a `ray.init` in the block start no dashboard, for which it would wait; yields what starts it, if anything."""
    start: Any = Node.start_api_server
    left: list[Callable[[], None]] = []

    def keep(node: Node, **options: Any) -> None:
        left.append(lambda: start(node, **options))

    Node.start_api_server = keep  # type: ignore[method-assign,assignment]
    try:
        yield left
    finally:
        Node.start_api_server = start  # type: ignore[method-assign]
    services.logger.addFilter(lambda _: worker.is_initialized())  # a Ray that ends meanwhile needs no dashboard


def wait_for_proxies(seconds: float) -> None:
    """Let Ray Serve wait so long for its proxies to start, instead of 60 seconds."""
    for module in (api, client):
        vars(module)["HTTP_PROXY_TIMEOUT"] = seconds


def listening_host() -> str:
    """The host that Ray Serve listens on. Call it in a process that is connected to a running Serve."""
    connected = _get_global_client()
    assert connected is not None  # it raises where there is no Serve
    return str(connected.http_config.host)


def hide_lines(pattern: re.Pattern[str]) -> None:
    """Do not print other processes' lines that match `pattern`, unless RAY_DEDUP_LOGS_SKIP_REGEX is set.

    Ray reads that variable when it is imported, which `serve run` does before the service can set it.
    """
    for printed in (ray_logging.stdout_deduplicator, ray_logging.stderr_deduplicator):
        printed.skip_re = printed.skip_re or pattern
