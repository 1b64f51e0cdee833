"""Starts the service as a user does, and clients for it, in tests on a real cluster."""

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.system.conftest import BIN, ROOT, Cluster, environment
from tests.waiting import eventually

START_SECONDS = 180
BODY = {"prompt": "Once", "max_new_tokens": 8, "ignore_eos": True, "seed": 1}
QUICK = {"poll_seconds": 0.5, "slots": 4, "threads": 1, "backend": "torch", "dtype": "float32"}
"""Settings of a service for tests on two cores."""


def in_ray(cluster: Cluster, code: str) -> str:
    """Runs `code` in a driver on the cluster. Returns its output."""
    return subprocess.run(
        [sys.executable, "-c", f"import ray; ray.init(log_to_driver=False, logging_level='ERROR'); {code}"],
        env=environment(cluster.home, RAY_ADDRESS=cluster.address),
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def await_figures(cluster: Cluster, names: Iterable[str]) -> None:
    """Waits until Ray's exporter has metrics with all these names."""
    port = in_ray(cluster, "print(ray.nodes()[0]['MetricsExportPort'])")

    def exported() -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                text = answer.read().decode()
            return all(f"\nray_{name}" in text for name in names)
        return False

    eventually(exported, "Ray's exporter has the figures", 180)


@dataclass
class Service:
    """A service and its address."""

    url: str
    cluster: Cluster
    process: subprocess.Popen[str] | None = None

    def ask(self, route: str = "/generate", body: Any = BODY, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """(status, JSON of the reply); a GET without a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + route, data, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def version(self) -> str:
        """The version that answers now."""
        status, reply = self.ask()
        assert status == 200, reply
        return str(reply["version"])

    def is_ready(self) -> bool:
        """Whether the default model is warm."""
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            return self.ask("/ready", None)[0] == 200
        return False

    def replicas(self) -> list[psutil.Process]:
        """The replicas' processes on this cluster."""
        return [process for process in family(self.cluster) if "ServeReplica" in title(process)]


def family(cluster: Cluster) -> list[psutil.Process]:
    """Every process of the cluster."""
    started = {"--head", f"--port={cluster.address.rpartition(':')[2]}"}
    head = next(
        process for process in psutil.process_iter(["cmdline"]) if started <= set(process.info["cmdline"] or ())
    )
    return head.children(recursive=True)


def name_of(process: psutil.Process) -> str:
    """The process's name; empty if it has just ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def title(process: psutil.Process) -> str:
    """The title of a Ray worker's process; empty if it has just ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@dataclass
class Load:
    """Clients that send requests one after the other until the block ends, and their answers."""

    service: Service
    clients: int
    body: dict[str, Any] = field(default_factory=lambda: dict(BODY))
    told: Counter[tuple[int | str, str]] = field(default_factory=Counter)
    latest: deque[str] = field(default_factory=lambda: deque(maxlen=100))
    """The versions in the latest answers, from all replicas."""

    def __enter__(self) -> "Load":
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                status, reply = self.service.ask(body=self.body)
                version = str(reply.get("version", reply))
                self.told[status, version] += 1
                self.latest.append(version)
            except Exception as error:
                self.told[type(error).__name__, str(error)] += 1

    @property
    def failed(self) -> dict[tuple[int | str, str], int]:
        """Every answer but 200."""
        return {answer: count for answer, count in self.told.items() if answer[0] != 200}

    def answered(self, version: str | None = None) -> int:
        """The number of answers with status 200, from one version or from all."""
        return sum(count for (status, of), count in self.told.items() if status == 200 and version in (None, of))


@contextlib.contextmanager
def served(
    cluster: Cluster, *command: str, port: int, bin: Path = BIN, seconds: float = START_SECONDS, **env: str
) -> Iterator[Service]:
    """Runs `serve run` with these arguments until the block ends, and stops it with Ctrl-C.

    It must be ready within `seconds`.
    """
    process = subprocess.Popen(
        [bin / "serve", "run", *command],
        cwd=ROOT,
        env=environment(cluster.home, RAY_ADDRESS=cluster.address, **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output: list[str] = []
    assert process.stdout
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
    reader.start()
    service = Service(f"http://127.0.0.1:{port}", cluster, process)
    try:
        eventually(lambda: service.is_ready() or process.poll() is not None, "the service is ready", seconds)
        assert process.poll() is None, "".join(output)
        yield service
    except AssertionError as error:
        told = "".join(line for line in output if '"message": "request"' not in line)
        raise AssertionError(f"{error}\nthe service said:\n{told[-8000:]}") from error
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        reader.join()
        # Should that have taken too long, the next test finds another's service no more.
        env = environment(cluster.home, RAY_DASHBOARD_ADDRESS=cluster.dashboard)
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([BIN / "serve", "shutdown", "--yes"], cwd=ROOT, env=env, capture_output=True, timeout=120)


def said(**settings: Any) -> list[str]:
    """Settings as a command line has them."""
    return [f"{name}={value}" for name, value in settings.items()]
