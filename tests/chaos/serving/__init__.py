"""Faults of serving, under a steady load of clients that know every text.

What is promised: no wrong text and no stream that just ends, whatever happens. A request that fails says so: 503 with
Retry-After, an error of the API, or a connection that ends in the middle. Where a model does not have to be loaded, all
is well again within three seconds. What changes a service (a reload, a redeploy, fewer replicas) fails no request.
"""

from collections.abc import Callable
from typing import Any

from tests.chaos.fault import Fault
from tests.chaos.serving.load import overload, redeployed, scaled_down, soak
from tests.chaos.serving.models import alias_moved, broken_versions, deleted_version, registry_away, too_large
from tests.chaos.serving.processes import REPLICA, cluster_killed, few_descriptors, full_disk, killed, stopped
from tests.chaos.serving.scene import HAPROXY, PROXY, main_scene, scene
from tests.chaos.serving.visitors import bad_clients

__all__ = ["FAULTS", "HAPROXY", "PROXY", "scene"]


def behind(front: str) -> Callable[[Any], bool]:
    return lambda setting: setting.front == front


def several(setting: Any) -> bool:
    return bool(setting.replicas > 1)


def single(setting: Any) -> bool:
    return bool(setting.replicas == 1)


def main(setting: Any) -> bool:
    return main_scene(setting.front, setting.replicas)


def fault(name: str, what: str, promise: str, run: Any, fits: Callable[[Any], bool] = lambda setting: True) -> Fault:
    return Fault("serving", name, what, promise, run, fits)


NOTHING_LOST = "fails no request"
TOLD = "only what was under way fails, and its client sees it; back within 3 s where nothing has to load"
TWICE = "what is admitted takes at most twice as long, the rest gets 503"
STARVED = "no text is wrong, who fails is told; all is well within 3 s after it"
AGAIN = "no text is wrong, who fails is told; `ray start` and `serve deploy` bring it back"
CONTROLLER = killed("ray::ServeController", 3, may=())
MANAGER = killed("ray::HAProxyManager", 3, may=())
FAULTS = [
    fault("kill-replica", "kill -9 of a replica", TOLD, killed(REPLICA, 5)),
    fault("kill-replicas", "kill -9 of two replicas", TOLD, killed(REPLICA, 3, 2), several),
    fault("kill-haproxy", "kill -9 of HAProxy", TOLD, killed("haproxy", 5), behind(HAPROXY)),
    fault("kill-manager", "kill -9 of HAProxy's manager", NOTHING_LOST, MANAGER, behind(HAPROXY)),
    fault("kill-proxy", "kill -9 of Ray's proxy", TOLD, killed("ray::ProxyActor", 3), behind(PROXY)),
    fault("kill-controller", "kill -9 of Serve's controller", NOTHING_LOST, CONTROLLER),
    fault("stop-replica", "SIGSTOP of a replica for 20 s", "the others answer; no text is wrong", stopped, several),
    fault("alias", "the alias moves ten times in four seconds", NOTHING_LOST, alias_moved),
    fault("broken", "the alias on a broken package", "refused by name", broken_versions, main),
    fault("deleted", "the alias on a version that is deleted", NOTHING_LOST, deleted_version, main),
    fault("memory", "the alias on a model larger than the memory", "refused by name", too_large, main),
    fault("registry", "the registry away, wrong or late; the alias moves", NOTHING_LOST, registry_away, main),
    fault("clients", "clients that leave, never read, send slowly, or nothing", "the others are served", bad_clients),
    fault("redeploy", "every replica replaced by a `serve deploy`", NOTHING_LOST, redeployed, several),
    fault("scale-down", "from three replicas to one and back", NOTHING_LOST, scaled_down, several),
    fault("overload", "ten times the load", TWICE, overload, main),
    fault("soak", "50 reloads and 10,000 requests", "memory and descriptors stay flat", soak, main),
    fault("descriptors", "no more files may be opened", STARVED, few_descriptors),
    fault("disk", "the disks of logs, temporary files and caches full", STARVED, full_disk, main),
    fault("kill-gcs", "kill -9 of Ray's GCS", AGAIN, cluster_killed("gcs_server"), single),
    fault("kill-node", "kill -9 of the raylet of the only node", AGAIN, cluster_killed("raylet"), single),
]
