"""Ray's private modules: all that this project uses of them in training, a function for each use.

Tried with Ray 2.60. If an upgrade changes one, tests/train_job/cluster/test_internals.py fails and names it. Ray is
imported inside functions, since that takes a second.
"""

import functools
import json
import subprocess
from typing import Any


def use_own_process_groups() -> None:
    """Makes Ray start its servers in process groups of their own.

    A stop often goes to the whole group: from `timeout`, or a terminal that closes. Ray's servers would end at once,
    and the job could not ask its workers for a last checkpoint. They still end with the job: the kernel kills them
    when their parent dies.
    """
    from ray._private import services

    services.ConsolePopen = functools.partial(subprocess.Popen, process_group=0)  # type: ignore[assignment,misc]


def start_bare(processes: int) -> None:
    """Makes Ray start without servers for a dashboard, an autoscaler and a terminal.

    `ray.init` waits for the dashboard's server even if there is no dashboard. `processes` is how many Python processes
    start in advance; 0 leaves it at the number of CPUs.
    """
    from ray._private import node, services

    for server in ("start_api_server", "start_monitor", "start_log_monitor"):
        setattr(node.Node, server, lambda *_, **__: None)
    start = getattr(services.start_ray_process, "__wrapped__", services.start_ray_process)  # of an earlier call
    wanted = ("--num_prestart_python_workers=", "--maximum_startup_concurrency=")

    @functools.wraps(start)
    def start_with(command: list[str], *arguments: Any, **named: Any) -> Any:
        command = [f"{part.partition('=')[0]}={processes}" if part.startswith(wanted) else part for part in command]
        return start(command, *arguments, **named)

    services.start_ray_process = start_with if processes else start


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
