"""Processes that are killed, stopped, or run out of what they need."""

import contextlib
import random
import resource
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.clients import FAILURES_TOLD
from tests.chaos.disks import fill, mounted_disk, tmpfs
from tests.chaos.fault import Result
from tests.chaos.serving.scene import CLIENTS, HAPROXY, Scene, back, tally
from tests.waiting import eventually

REPLICA = "ray::ServeReplica:default:gpt"
STOPPED_SECONDS = 20.0
STARVED_SECONDS = 10.0


def killed(name: str, times: int, count: int = 1, may: tuple[str, ...] = FAILURES_TOLD) -> Any:
    """Kills processes of that name with SIGKILL, at random moments."""

    def run(scene: Scene, rng: random.Random) -> Result:
        scene.await_whole()
        result, begun = Result(), time.monotonic()
        for _ in range(times):
            scene.await_whole()
            eventually(lambda: len(scene.processes(name)) >= min(count, scene.replicas), f"{name} is there", 60)
            scene.clients.await_answers(rng.randint(1, 30))
            victims = rng.sample(found := scene.processes(name), min(count, len(found)))
            moment = time.monotonic()
            kill(victims)
            back(scene, moment, result, loads=name == REPLICA and count >= scene.replicas)
            result.times += 1
        return tally(scene, begun, result, may, CLIENTS * times if may else 0)

    return run


def kill(victims: list[psutil.Process]) -> None:
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    psutil.wait_procs(victims, timeout=10)


def cluster_killed(name: str) -> Any:
    """Kills a process without which there is no cluster, and starts another cluster with the service."""

    def run(scene: Scene, rng: random.Random) -> Result:
        scene.await_whole()
        result, begun = Result(times=1), time.monotonic()
        scene.clients.await_answers(rng.randint(1, 30))
        kill(scene.processes(name))
        time.sleep(STARVED_SECONDS)
        restarted = time.monotonic()
        scene.new_cluster()
        scene.clients.await_calm(restarted)
        result.recovery.append(time.monotonic() - restarted)
        # Cut by its death, and by the end of what was left.
        return tally(scene, begun, result, FAILURES_TOLD, 2 * CLIENTS)

    return run


def stopped(scene: Scene, rng: random.Random) -> Result:
    """A replica that answers no more and does not die."""
    scene.await_whole()
    result, begun = Result(times=1), time.monotonic()
    victim = rng.choice(scene.service.replicas())
    victim.suspend()
    time.sleep(STOPPED_SECONDS / 2)  # until then the front may not have noticed
    answered = 0
    while time.monotonic() < begun + STOPPED_SECONDS:  # the steady clients may all wait for the stopped one
        answered += scene.clients.answer(rng.choice(scene.wanted))[0] == "right"
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.resume()
    back(scene, time.monotonic(), result)
    result.expect(answered > CLIENTS, f"the others answered {answered} requests in its last ten seconds")
    return tally(scene, begun, result, FAILURES_TOLD, CLIENTS)


def few_descriptors(scene: Scene, rng: random.Random) -> Result:
    """The front, and then the replicas, may open two files more than they have, and a crowd connects."""
    scene.await_whole()
    result, begun = Result(), time.monotonic()
    front = "haproxy" if scene.front == HAPROXY else "ray::ProxyActor"
    for name in (front, REPLICA):
        with ExitStack() as stack:
            for victim in scene.processes(name):
                _, most = victim.rlimit(resource.RLIMIT_NOFILE)
                before = victim.rlimit(resource.RLIMIT_NOFILE, (victim.num_fds() + 2, most)) or (most, most)
                stack.callback(unlimited, victim, before)
            for _ in range(100):
                stack.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", scene.port), 30)))
            time.sleep(STARVED_SECONDS)
        back(scene, time.monotonic(), result)
        result.times += 1
        scene.await_whole()
    return tally(scene, begun, result, FAILURES_TOLD, 2 * CLIENTS)


def unlimited(process: psutil.Process, limits: tuple[int, int]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.rlimit(resource.RLIMIT_NOFILE, limits)


def full_disk(scene: Scene, rng: random.Random) -> Result:
    """The disks of the temporary files, Ray's logs among them, and of the caches are full; a replica dies then."""
    result = Result(times=1)
    if not scene.disk:
        result.expect(False, "not tried: it takes root to mount a small disk")
        return result
    while len(scene.versions) < 2:
        scene.publish()
    scene.await_whole()
    begun, version = time.monotonic(), rng.choice(scene.versions)
    records = scene.home / ".cache" / "loading"
    with mounted_disk(records, *tmpfs("1m")):
        ballast = [Path(folder) / "ballast" for folder in (records, scene.disk)]
        for file in ballast:
            fill(file, 0)
        scene.point(version)
        kill([rng.choice(scene.service.replicas())])
        until = time.monotonic() + 2 * STARVED_SECONDS
        while time.monotonic() < until:
            fill(ballast[1], 0)
            time.sleep(0.1)
        for file in ballast:
            file.unlink()
    moment = time.monotonic()
    back(scene, moment, result)
    scene.await_whole()
    scene.await_only(version)
    return tally(scene, begun, result, FAILURES_TOLD, CLIENTS)
