"""Faults of serving, under a steady load of clients that know every text.

What is promised: no wrong text and no stream that just ends, whatever happens. A request that fails says so: 503 with
Retry-After, an error of the API, or a connection that ends in the middle. Where a model does not have to be loaded, all
is well again within three seconds. What changes a service (a reload, a redeploy, fewer replicas) fails no request.
"""

import contextlib
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from serve_app.front import haproxy
from tests.chaos import packages
from tests.chaos.clients import FAILURES_TOLD, Answer, Ask, Clients, asks, texts
from tests.chaos.fault import Fault, Result
from tests.ports import free_port
from tests.serve_app.conftest import TestRegistry, package_maker, registry_in
from tests.system.conftest import started
from tests.system.serving import QUICK, Service, family, name_of, said, served, title
from tests.waiting import eventually

HAPROXY, PROXY = "haproxy", "Ray's own proxy"
MODEL = "chaos"
CLIENTS = 6
SLOTS = 4
BACK_SECONDS = 3.0
"""All is well again within so long, where nothing has to load."""
REPLACED_SECONDS = 120.0
"""In which Ray replaces what died, on a busy machine."""
STOPPED_SECONDS = 20.0


@dataclass
class Scene:
    """A service, its registry, and the clients that ask it all the time."""

    front: str
    replicas: int
    service: Service
    registry: TestRegistry
    clients: Clients
    wanted: list[Ask]
    backend: str
    scratch: Path
    versions: list[str] = field(default_factory=list)
    """Of the registered model, in the order in which they were made."""
    made: int = 0

    def publish(self, promote: str = "never") -> str:
        """A new version with other weights, and what it answers."""
        seed = len(self.versions) + 1
        version = self.registry.publish(MODEL, seed=seed, promote=promote)
        self.clients.expected[version] = texts(self.registry.make_package(seed), self.wanted, self.backend)
        self.versions.append(version)
        return version

    def point(self, version: str) -> None:
        self.registry.point(MODEL, version)

    def await_whole(self) -> None:
        """Waits until every replica is there and every request is answered."""
        eventually(lambda: len(self.service.replicas()) == self.replicas, "every replica is there", REPLACED_SECONDS)
        self.clients.await_calm(time.monotonic(), REPLACED_SECONDS)

    def processes(self, name: str) -> list[psutil.Process]:
        """The cluster's processes of that name."""
        return [one for one in family(self.service.cluster) if name in (name_of(one), title(one).split(".")[0])]

    def refused(self) -> dict[str, str]:
        """The versions that the service refuses, and why; none while it does not answer."""
        status, said = self.service.ask("/models", None)
        return dict(said["models"][0]["refused"]) if status == 200 else {}


@contextlib.contextmanager
def scene(front: str, replicas: int, backend: str, scratch: Path) -> Iterator[Scene]:
    """A cluster, a service of so many replicas behind this front, and clients that ask it."""
    env = {} if front == HAPROXY else {haproxy.SWITCH: "0"}
    haproxy.use_haproxy(env)
    home, port, wanted = scratch / "home", free_port(), asks()
    home.mkdir(parents=True)
    settings = QUICK | {"model": f"models:/{MODEL}@champion", "port": port, "backend": backend, "slots": SLOTS}
    settings |= {"min_replicas": replicas, "max_replicas": replicas}
    settings |= {"max_queue": SLOTS} if front == HAPROXY else {}  # Ray's own proxy counts bursts as a queue
    with started(home, **env) as cluster, registry_in(home, package_maker(scratch / "packages")) as registry:
        clients = Clients(port, CLIENTS, wanted, {})
        found = Scene(front, replicas, Service("", cluster), registry, clients, wanted, backend, scratch)
        found.publish("always")
        with served(cluster, "serve_app:build_app", *said(**settings), port=port) as found.service, clients:
            found.await_whole()
            yield found


def tally(scene: Scene, begun: float, result: Result, may: tuple[str, ...] = (), most: int = 0) -> Result:
    """Counts the answers since `begun`. Failures of the kinds in `may` are promised, at most `most` of them cut."""
    answers = scene.clients.since(begun)
    result.touched += len(answers)
    lost = [answer for answer in answers if answer.kind not in ("right", *may)]
    cut = [answer for answer in answers if answer.kind in may and answer.kind in ("cut", "error")]
    result.told += sum(answer.kind in may for answer in answers)
    result.lost += len(lost) + max(0, len(cut) - most)
    result.expect(not lost, f"{len(lost)} lost, such as {shown(lost)}")
    result.expect(len(cut) <= most, f"{len(cut)} ended in the middle, at most {most} were under way")
    return result


def shown(answers: list[Answer]) -> str:
    return f"{answers[0].kind} {answers[0].said[:200]}" if answers else ""


# --- killed -----------------------------------------------------------------------------------------------------


def killed(name: str, times: int, count: int = 1, may: tuple[str, ...] = FAILURES_TOLD) -> Any:
    """Kills processes of that name with SIGKILL, at random moments."""

    def run(scene: Scene, rng: random.Random) -> Result:
        scene.await_whole()
        result, begun = Result(), time.monotonic()
        loads = "Replica" in name and count >= scene.replicas
        for _ in range(times):
            scene.await_whole()
            eventually(lambda: len(scene.processes(name)) >= min(count, scene.replicas), f"{name} is there", 60)
            scene.clients.await_answers(rng.randint(1, 30))
            victims = rng.sample(found := scene.processes(name), min(count, len(found)))
            moment = time.monotonic()
            for victim in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
            psutil.wait_procs(victims, timeout=10)
            back = scene.clients.await_calm(moment, REPLACED_SECONDS)
            result.recovery.append(back)
            result.times += 1
            result.expect(loads or back <= BACK_SECONDS, f"back after {back:.1f} s")
        return tally(scene, begun, result, may, CLIENTS * times if may else 0)

    return run


def replica_stopped(scene: Scene, rng: random.Random) -> Result:
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
    result.recovery.append(max(0.0, scene.clients.await_calm(time.monotonic(), REPLACED_SECONDS)))
    result.expect(answered > CLIENTS, f"the others answered {answered} requests in its last ten seconds")
    return tally(scene, begun, result, FAILURES_TOLD, CLIENTS)


# --- models -----------------------------------------------------------------------------------------------------


def alias_moved(scene: Scene, rng: random.Random) -> Result:
    """Ten moves in four seconds."""
    scene.await_whole()
    while len(scene.versions) < 4:
        scene.publish()
    result, begun = Result(), time.monotonic()
    for moment in sorted(rng.uniform(0, 4) for _ in range(10)):
        time.sleep(max(0.0, begun + moment - time.monotonic()))
        last = rng.choice(scene.versions)
        scene.point(last)
        result.times += 1
    moved = time.monotonic()
    eventually(lambda: only(scene, last), f"version {last} alone answers", REPLACED_SECONDS)
    result.recovery.append(time.monotonic() - moved)
    return tally(scene, begun, result)


def only(scene: Scene, version: str) -> bool:
    """Whether this version alone has answered lately, more often than there are clients and replicas."""
    lately = [answer.version for answer in scene.clients.answers[-10 * CLIENTS :]]
    return set(lately) == {version}


def broken_versions(scene: Scene, rng: random.Random) -> Result:
    """The alias on each kind of broken package, in random order."""
    scene.await_whole()
    good, result, begun = scene.versions[-1], Result(), time.monotonic()
    scene.point(good)
    kinds = list(packages.broken())
    rng.shuffle(kinds)
    source = scene.registry.make_package(len(scene.versions)).path
    for number, (kind, harm) in enumerate(kinds):
        folder = packages.copy(source, scene.scratch / f"broken-{scene.made}-{number}")
        harm(folder)
        version = str(scene.registry.client.create_model_version(MODEL, folder.as_uri()).version)
        moved = time.monotonic()
        scene.point(version)
        try:
            eventually(lambda version=version: scene.refused().get(version), f"{kind} is refused", 30)
        except AssertionError:
            result.expect(False, f"a package whose {kind} is not refused by name")
        result.recovery.append(time.monotonic() - moved)
        result.times += 1
    scene.made += 1
    scene.point(good)
    return tally(scene, begun, result)


def deleted_version(scene: Scene, rng: random.Random) -> Result:
    """The alias on a version that is deleted before, or while, it is loaded."""
    scene.await_whole()
    result, begun = Result(), time.monotonic()
    for _ in range(3):
        good, doomed = scene.versions[-1], scene.publish()
        scene.point(doomed)
        time.sleep(rng.uniform(0, 1.5))
        scene.registry.client.delete_model_version(MODEL, doomed)
        scene.versions.remove(doomed)
        scene.clients.await_answers(5 * CLIENTS)
        scene.point(good)
        eventually(lambda good=good: only(scene, good), f"version {good} alone answers", REPLACED_SECONDS)
        result.times += 1
    return tally(scene, begun, result)


# --- clients ----------------------------------------------------------------------------------------------------

LONG = Ask("Once", 1, 100, stream=True)


def bad_clients(scene: Scene, rng: random.Random) -> Result:
    """Clients that leave, that never read, that send a byte a second, and a thousand connections that say nothing."""
    scene.await_whole()
    port, result, begun = scene.clients.port, Result(), time.monotonic()
    head = f"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(LONG.body)}\r\n\r\n".encode()
    with ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=30)))

        for _ in range(100):  # they leave
            with contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=30)) as leaving:
                leaving.sendall(head + LONG.body)
                leaving.recv(rng.choice((1, 100)))
            result.times += 1
        for _ in range(SLOTS):  # they never read
            unread = connect()
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            unread.sendall(head + LONG.body)
            result.times += 1
        slow = [connect() for _ in range(50)]
        idle = [connect() for _ in range(1000)]
        result.times += len(slow) + len(idle)
        for byte in head[:8]:
            for connection in slow:
                with contextlib.suppress(OSError):  # the front waits ten seconds for a request
                    connection.sendall(bytes([byte]))
            time.sleep(1)
        result.recovery.append(scene.clients.await_calm(time.monotonic(), 60))
    return tally(scene, begun, result, ("unavailable",))


def overload(scene: Scene, rng: random.Random) -> Result:
    """Ten times as many clients as there are slots, for a while."""
    scene.await_whole()
    seconds, crowd = 30.0, 10 * SLOTS * scene.replicas
    full = Clients(scene.clients.port, SLOTS * scene.replicas, scene.wanted, scene.clients.expected)
    with full:
        time.sleep(seconds / 3)
    normal = full.latency(0, time.monotonic())
    result, begun = Result(times=1), time.monotonic()
    with Clients(scene.clients.port, crowd, scene.wanted, scene.clients.expected, pause=1.0) as many:
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
    while len(scene.versions) < 4:
        scene.publish()

    def reloads(count: int) -> None:
        for _ in range(count):
            version = rng.choice([v for v in scene.versions if v != scene.clients.answers[-1].version])
            scene.point(version)
            eventually(lambda version=version: only(scene, version), f"only {version} answers", REPLACED_SECONDS)

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


def behind(front: str) -> Callable[[Any], bool]:
    return lambda setting: setting.front == front


def several(setting: Any) -> bool:
    return bool(setting.replicas > 1)


def main_scene(setting: Any) -> bool:
    """Where what depends on neither front nor runner is tried."""
    return bool(setting.front == HAPROXY and setting.replicas > 1)


REPLICA = "ray::ServeReplica:default:gpt"
NOTHING_LOST = "fails no request"
TOLD = "only what was under way fails, and its client sees it; back within 3 s where nothing has to load"
CONTROLLER = killed("ray::ServeController", 3, may=())
MANAGER = killed("ray::HAProxyManager", 3, may=())
CLIENTS_TEXT = "clients that leave, never read, send a byte a second, or nothing"
TWICE = "what is admitted takes at most twice as long, the rest gets 503"
STOPPED = "the others answer; no text is wrong"
FAULTS = [
    Fault("serving", "kill-replica", "kill -9 of a replica", TOLD, killed(REPLICA, 5)),
    Fault("serving", "kill-replicas", "kill -9 of two replicas", TOLD, killed(REPLICA, 3, 2), several),
    Fault("serving", "kill-haproxy", "kill -9 of HAProxy", TOLD, killed("haproxy", 5), behind(HAPROXY)),
    Fault("serving", "kill-manager", "kill -9 of HAProxy's manager", NOTHING_LOST, MANAGER, behind(HAPROXY)),
    Fault("serving", "kill-proxy", "kill -9 of Ray's proxy", TOLD, killed("ray::ProxyActor", 3), behind(PROXY)),
    Fault("serving", "kill-controller", "kill -9 of Serve's controller", NOTHING_LOST, CONTROLLER, behind(HAPROXY)),
    Fault("serving", "stop-replica", "SIGSTOP of a replica for 20 s", STOPPED, replica_stopped, several),
    Fault("serving", "alias", "the alias moves ten times in four seconds", NOTHING_LOST, alias_moved),
    Fault("serving", "broken", "the alias on a broken package", "refused by name", broken_versions, main_scene),
    Fault("serving", "deleted", "the alias on a version that is deleted", NOTHING_LOST, deleted_version, main_scene),
    Fault("serving", "clients", CLIENTS_TEXT, "the others are served", bad_clients),
    Fault("serving", "overload", "ten times the load", TWICE, overload, main_scene),
    Fault("serving", "soak", "50 reloads and 10,000 requests", "memory and descriptors stay flat", soak, main_scene),
]
