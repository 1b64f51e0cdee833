"""More load than there is room for, much load, and changes of the service under load."""

import contextlib
import random
import time

import psutil

from tests.chaos.clients import Clients
from tests.chaos.fault import Result
from tests.chaos.serving.models import several_versions
from tests.chaos.serving.scene import BACK_SECONDS, CLIENTS, REPLACED_SECONDS, SLOTS, Scene, tally
from tests.system.serving import family, name_of, title
from tests.waiting import eventually


def overload(scene: Scene, rng: random.Random) -> Result:
    """Ten times as many clients as there are slots, for a while."""
    scene.await_whole()
    seconds, crowd = 30.0, 10 * SLOTS * scene.replicas
    full = Clients(scene.port, SLOTS * scene.replicas, scene.wanted, scene.clients.expected)
    with full:
        time.sleep(seconds / 3)
    normal = full.latency(0, time.monotonic())
    result, begun = Result(times=1), time.monotonic()
    with Clients(scene.port, crowd, scene.wanted, scene.clients.expected, pause=1.0) as many:
        time.sleep(seconds)
        ended = time.monotonic()
    under = many.latency(begun, ended)
    result.expect(0 < under <= 2 * normal, f"an answer took {under:.2f} s instead of {normal:.2f}")
    result.recovery.append(scene.clients.await_calm(time.monotonic(), 60))
    result.expect(result.recovery[-1] <= BACK_SECONDS, f"back after {result.recovery[-1]:.1f} s")
    scene.clients.answers = sorted(scene.clients.answers + many.answers, key=lambda answer: answer.answered)
    return tally(scene, begun, result, ("unavailable",))


def soak(scene: Scene, rng: random.Random) -> Result:
    """Many requests and reloads; memory and descriptors stay as they were after the first part."""
    scene.await_whole()
    several_versions(scene)

    def reloads(count: int) -> None:
        for _ in range(count):
            version = rng.choice([v for v in scene.versions if v != scene.clients.answers[-1].version])
            scene.point(version)
            scene.await_only(version)

    reloads(10)
    begun, before = time.monotonic(), usage(scene)
    reloads(50)
    scene.clients.await_answers(max(1, 10_000 - len(scene.clients.since(begun))), 1200)
    after = usage(scene)
    result = Result(times=50)
    for name, (memory, descriptors) in after.items():
        was_memory, was_descriptors = before.get(name, (memory, descriptors))
        result.expect(memory <= 1.05 * was_memory + 8, f"{name} grew from {was_memory:.0f} to {memory:.0f} MiB")
        result.expect(
            descriptors <= was_descriptors + 2 * CLIENTS,
            f"{name} had {was_descriptors} descriptors and then {descriptors}",
        )
    return tally(scene, begun, result)


def usage(scene: Scene) -> dict[str, tuple[float, int]]:
    """MiB of memory and open files of every process of the cluster that serves, by name and id."""
    found = {}
    for process in family(scene.service.cluster):
        with contextlib.suppress(psutil.Error):
            name = name_of(process) if name_of(process) == "haproxy" else title(process).split(".")[0]
            if any(part in name for part in ("ServeReplica", "haproxy", "ProxyActor", "HAProxyManager")):
                found[f"{name[:40]} {process.pid}"] = (
                    process.memory_info().rss / 2**20,
                    process.num_fds(),
                )
    return found


def redeployed(scene: Scene, rng: random.Random) -> Result:
    """The service is deployed again with another setting, so that every replica is replaced."""
    scene.await_whole()
    result, begun = Result(), time.monotonic()
    for most in (rng.randint(500, 1000), None):
        before = {process.pid for process in scene.service.replicas()}
        deployed = time.monotonic()
        scene.deploy(**({"max_new_tokens": most} if most else {}))
        eventually(lambda before=before: not before & pids(scene), "every replica is replaced", 2 * REPLACED_SECONDS)
        scene.await_whole()
        result.recovery.append(time.monotonic() - deployed)
        result.times += 1
    return tally(scene, begun, result)


def pids(scene: Scene) -> set[int]:
    return {process.pid for process in scene.service.replicas()}


def scaled_down(scene: Scene, rng: random.Random) -> Result:
    """From all replicas to one, and back."""
    scene.await_whole()
    result, begun = Result(times=1), time.monotonic()
    for count in (1, scene.replicas):
        deployed = time.monotonic()
        scene.deploy(count)
        scene.await_whole(count)
        scene.clients.await_answers(5 * CLIENTS)
        result.recovery.append(time.monotonic() - deployed)
    return tally(scene, begun, result)
