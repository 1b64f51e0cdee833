"""A service on a cluster of its own, under a steady load of clients that know every text."""

import contextlib
import http.client
import json
import subprocess
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from gptcore.home import home as own_home
from serve_app.front import haproxy
from tests.chaos.clients import Answer, Ask, Clients, asks, texts
from tests.chaos.disks import mounted_disk, tmpfs
from tests.chaos.fault import Result
from tests.chaos.gate import Gate
from tests.ports import free_port
from tests.serve_app.conftest import TestRegistry, package_maker, registry_in
from tests.system.conftest import BIN, ROOT, TOKEN, environment, started
from tests.system.serving import QUICK, START_SECONDS, Service, family, name_of, title
from tests.system.tracking import TrackingServer
from tests.waiting import eventually

HAPROXY, PROXY = "haproxy", "Ray's own proxy"
MODEL = "chaos"
CLIENTS = 6
SLOTS = 4
DISK_SIZE = "500m"
BACK_SECONDS = 3.0
"""All is well again within so long, where nothing has to load."""
REPLACED_SECONDS = 120.0
"""In which Ray replaces what died, on a busy machine."""


@dataclass
class Scene:
    """A service, its registry, and the clients that ask it all the time."""

    front: str
    replicas: int
    backend: str
    scratch: Path
    port: int
    env: dict[str, str]
    """Of the cluster."""
    registry: TestRegistry
    gate: Gate | None
    """Between the service and the registry, if that is a server."""
    disk: Path | None
    """A small disk for temporary files, those of Ray among them."""
    clients: Clients
    wanted: list[Ask]
    versions: list[str] = field(default_factory=list)
    """Of the registered model, in the order in which they were made."""
    made: int = 0
    """Broken packages."""

    def __enter__(self) -> "Scene":
        with ExitStack() as self._stack:
            self.new_cluster()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def home(self) -> Path:
        return self.scratch / "home"

    def new_cluster(self) -> None:
        """Ends the cluster, if there is one, and starts another with the service."""
        self._stack.close()
        cluster = self._stack.enter_context(started(self.home, **self.env))
        self.service = Service(f"http://127.0.0.1:{self.port}", cluster)
        self.deploy()
        eventually(self.service.is_ready, "the service is ready", START_SECONDS)

    def deploy(self, replicas: int | None = None, **args: Any) -> None:
        """Deploys the service as docs/serving.md says. Other `args` replace its replicas; their number alone does not.

        With a number of replicas, the config sets that for the deployment.
        """
        settings = QUICK | {"model": f"models:/{MODEL}@champion", "backend": self.backend, "slots": SLOTS}
        settings |= {"min_replicas": self.replicas, "max_replicas": self.replicas}
        settings |= {"max_queue": SLOTS} if self.front == HAPROXY else {}  # Ray's own proxy counts bursts as a queue
        settings |= {"tracking_uri": self.gate.uri} if self.gate else {}
        application: dict[str, Any] = {"name": "default", "route_prefix": "/", "import_path": "serve_app:build_app"}
        application["args"] = settings | args
        if replicas:
            scaling = {"min_replicas": replicas, "max_replicas": replicas}
            application["deployments"] = [{"name": "gpt", "autoscaling_config": scaling}]
        config = {"proxy_location": "EveryNode", "applications": [application]}
        config["http_options"] = {"host": "127.0.0.1", "port": self.port}
        file = self.scratch / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        env = environment(self.home, RAY_DASHBOARD_ADDRESS=self.service.cluster.dashboard)
        command = [BIN / "serve", "deploy", file]
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr

    def publish(self, promote: str = "never") -> str:
        """A new version with other weights, and what it answers."""
        seed = len(self.versions) + 1
        version = self.registry.publish(MODEL, seed=seed, promote=promote)
        self.clients.expected[version] = texts(self.registry.make_package(seed), self.wanted, self.backend)
        self.versions.append(version)
        return version

    def register(self, folder: Path) -> str:
        """A version of what is in that folder, whatever it is."""
        return str(self.registry.client.create_model_version(MODEL, folder.as_uri()).version)

    def point(self, version: str) -> None:
        self.registry.point(MODEL, version)

    def await_whole(self, replicas: int | None = None) -> None:
        """Waits until every replica runs, none starts or stops, and every request is answered."""
        whole = {"RUNNING": replicas or self.replicas}
        eventually(lambda: self.states() == whole, f"the replicas are {whole}", REPLACED_SECONDS)
        self.clients.await_calm(time.monotonic(), REPLACED_SECONDS)

    def states(self) -> Counter[str]:
        """How many replicas are in each of Ray's states; none while Ray does not say."""
        url = f"{self.service.cluster.dashboard}/api/serve/applications/"
        request = urllib.request.Request(url, headers={"authorization": f"Bearer {TOKEN}"})
        with contextlib.suppress(OSError, ValueError, LookupError, http.client.HTTPException):
            with urllib.request.urlopen(request, timeout=10) as answer:
                replicas = json.load(answer)["applications"]["default"]["deployments"]["gpt"]["replicas"]
            return Counter(str(replica["state"]) for replica in replicas)
        return Counter()

    def await_only(self, version: str) -> None:
        """Waits until this version alone answers, more often than there are clients and replicas."""

        def alone() -> bool:
            lately = self.clients.answers[-5 * CLIENTS :]
            return {answer.version for answer in lately} == {version}

        eventually(alone, f"version {version} alone answers", REPLACED_SECONDS)

    def processes(self, name: str) -> list[psutil.Process]:
        """The cluster's processes of that name."""
        return [one for one in family(self.service.cluster) if name in (name_of(one), title(one).split(".")[0])]

    def refused(self) -> dict[str, str]:
        """The versions that the service refuses, and why; none while it does not answer."""
        with contextlib.suppress(OSError):
            status, said = self.service.ask("/models", None)
            return dict(said["models"][0]["refused"]) if status == 200 else {}
        return {}


@contextlib.contextmanager
def scene(front: str, replicas: int, backend: str, scratch: Path) -> Iterator[Scene]:
    """A service of so many replicas behind this front, and clients that ask it.

    In the main scene the registry is a server, and temporary files are on a small disk. Elsewhere it is a file.
    """
    home, server, port, wanted = scratch / "home", scratch / "mlflow", free_port(), asks()
    (home / ".cache").mkdir(parents=True)
    (home / ".cache" / "native").symlink_to(own_home() / ".cache" / "native")  # the kernel is compiled once
    clients, disk, gate, uri = Clients(port, CLIENTS, wanted, {}), None, None, ""
    with ExitStack() as stack:
        if main_scene(front, replicas):
            server.mkdir()
            gate, uri = stack.enter_context(gated(server)), f"sqlite:///{server}/server.db"
            disk = stack.enter_context(temporary_disk(scratch.parent / "t"))  # short, as paths of sockets are
        env = {"TMPDIR": tempfile.gettempdir()} | ({} if front == HAPROXY else {haproxy.SWITCH: "0"})
        haproxy.use_haproxy(env)
        registry = stack.enter_context(registry_in(home, package_maker(scratch / "packages"), uri))
        found = Scene(front, replicas, backend, scratch, port, env, registry, gate, disk, clients, wanted)
        found.publish("always")
        with found, clients:
            found.await_whole()
            yield found


@contextlib.contextmanager
def temporary_disk(folder: Path) -> Iterator[Path | None]:
    """A small disk for temporary files of this process and those that it starts; None if it cannot be made."""
    before = tempfile.tempdir
    with mounted_disk(folder, *tmpfs(DISK_SIZE)) as mounted:
        tempfile.tempdir = str(folder) if mounted else before
        try:
            yield folder if mounted else None
        finally:
            tempfile.tempdir = before


@contextlib.contextmanager
def gated(folder: Path) -> Iterator[Gate]:
    """A registry's server behind a gate."""
    server = TrackingServer(folder)
    server.start()
    try:
        server.await_answer()
        with Gate(server.port) as gate:
            yield gate
    finally:
        server.kill()


def main_scene(front: str, replicas: int) -> bool:
    """Where what depends on neither front nor runner is tried."""
    return front == HAPROXY and replicas > 1


def tally(scene: Scene, begun: float, result: Result, may: tuple[str, ...] = (), most: int = 0) -> Result:
    """Counts the answers since `begun`. Failures of the kinds in `may` are promised, at most `most` of them cut."""
    answers = scene.clients.since(begun)
    result.touched += len(answers)
    lost = [answer for answer in answers if answer.kind not in ("right", *may)]
    cut = [answer for answer in answers if answer.kind in may and answer.kind in ("cut", "error")]
    result.told += sum(answer.kind in may for answer in answers)
    result.lost += len(lost) + max(0, len(cut) - most)
    result.expect(not lost, f"{len(lost)} lost, such as {shown(lost, begun)}")
    result.expect(len(cut) <= most, f"{len(cut)} ended in the middle, at most {most} were under way")
    return result


def back(scene: Scene, moment: float, result: Result, loads: bool = False) -> None:
    """Waits until all is well, and notes how long after `moment` that was: soon, unless a model has to load."""
    seconds = scene.clients.await_calm(moment, REPLACED_SECONDS)
    result.recovery.append(seconds)
    late = [answer for answer in scene.clients.since(moment + BACK_SECONDS) if answer.kind != "right"]
    result.expect(loads or not late, f"back after {seconds:.1f} s, such as {shown(late, moment)}")


def shown(answers: list[Answer], begun: float) -> str:
    """The first three of these answers."""
    return "; ".join(f"{a.kind} after {a.answered - begun:.1f} s {a.said[:120]}" for a in answers[:3])
