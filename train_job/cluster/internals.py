"""Ray's private modules: what this project uses of them in training, beside `own`, a function for each use.

Tried with Ray 2.60. If an upgrade changes one, tests/train_job/cluster/test_internals.py fails and names it. Ray is
imported inside functions, since that takes a second.
"""

import contextlib
import functools
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

SERVERS = ("start_api_server", "start_monitor", "start_log_monitor")
"""Methods of Ray's `Node` that start what a Ray of one job does not need."""


def use_own_process_groups() -> None:
    """Makes Ray start its servers in process groups of their own.

    A stop often goes to the whole group: from `timeout`, or a terminal that closes. Ray's servers would end at once,
    and the job could not ask its workers for a last checkpoint. They still end with the job: the kernel kills them
    when their parent dies.
    """
    from ray._private import services

    services.ConsolePopen = functools.partial(subprocess.Popen, process_group=0)  # type: ignore[assignment,misc]


@contextlib.contextmanager
def bare_ray(processes: int, environment: Mapping[str, str]) -> Iterator[None]:
    """A Ray that is started within the block has no servers for a dashboard, an autoscaler and a terminal.

    `ray.init` waits for the dashboard's server even if there is no dashboard. At least so many Python `processes` start
    in advance; 0 leaves it at the number of CPUs. Ray's servers have `environment` in addition to this process's.
    """
    from ray._private import node, ray_constants, services

    start: Any = services.start_ray_process
    servers = {name: getattr(node.Node, name) for name in SERVERS}
    added = {name: value for name, value in environment.items() if name not in os.environ}

    def start_with(command: list[str], *arguments: Any, **named: Any) -> Any:
        return start([_with_processes(part, processes) for part in command], *arguments, **named)

    def no_dashboard(head: Any, **_: Any) -> None:
        """An address where nobody answers: without one, Ray's agent looks for it every second and logs an error."""
        key, place = ray_constants.DASHBOARD_ADDRESS.encode(), ray_constants.KV_NAMESPACE_DASHBOARD
        head.get_gcs_client().internal_kv_put(key, b"127.0.0.1:9", True, place)

    os.environ.update(added)
    for name in servers:
        setattr(node.Node, name, no_dashboard if name == "start_api_server" else lambda *_: None)
    if processes:
        services.start_ray_process = start_with
    try:
        yield
    finally:
        services.start_ray_process = start
        for name, server in servers.items():
            setattr(node.Node, name, server)
        for name in added:
            del os.environ[name]


def _with_processes(argument: str, processes: int) -> str:
    """A raylet's argument, changed if it says how many processes it starts in advance, or at once."""
    name, _, value = argument.partition("=")
    if name == "--num_prestart_python_workers":
        return f"{name}={processes}"
    if name == "--maximum_startup_concurrency":
        return f"{name}={max(processes, int(value))}"
    return argument


def drop_raylet_reports() -> None:
    """Keeps what Ray's servers report off the terminal; `log_to_driver=False` covers the workers alone."""
    from ray._private import worker

    worker.print_to_stdstream = lambda *_, **__: None


def cluster_versions(address: str, seconds: float) -> dict[str, Any]:
    """The `ray_version` and `python_version` of the cluster at this address; {} if it has not written them yet.

    Raises grpc.RpcError, or Ray's AuthenticationError, if it does not answer within `seconds`.
    """
    from ray._common.usage import usage_constants
    from ray._private import ray_constants
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    rpc: Any = gcs_service_pb2
    wanted = rpc.InternalKVGetRequest(
        key=usage_constants.CLUSTER_METADATA_KEY, namespace=ray_constants.KV_NAMESPACE_CLUSTER
    )
    channel = init_grpc_channel(address)
    try:
        answer = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel).InternalKVGet(wanted, timeout=seconds)
    finally:
        channel.close()
    found: dict[str, Any] = json.loads(answer.value or b"{}")
    return found


def versions_match(cluster: dict[str, Any]) -> bool:
    """Whether Ray lets this process join a cluster of these versions."""
    from ray._private.utils import check_version_info

    try:
        check_version_info(cluster, "this machine")
    except RuntimeError:
        return False
    return True
