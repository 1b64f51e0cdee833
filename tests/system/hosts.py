"""Several hosts on one machine: network namespaces with their own addresses and names, joined by a bridge.

They share the file system, as hosts with network storage do, and nothing else that matters here: each reaches the
others by address only, and each can be taken away. What runs in the machine's own namespace reaches them all.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from serve_app.front import haproxy
from tests.system.conftest import BIN, ROOT, Cluster, environment
from tests.system.tracking import TrackingServer

NOTICED = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000"}
"""A silent host is given up after five seconds and not a minute."""
SILENCE_S = "20"
"""HAProxy waits no longer for a host that has stopped in the middle of an answer."""


@dataclass
class Host:
    """A namespace, its address, and what it takes to run something there."""

    name: str
    address: str
    gateway: str
    """The machine's own address on the bridge, for servers that all hosts use."""
    home: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def popen(self, *command: str | Path, stdout: IO[str] | int = subprocess.PIPE, **env: str) -> subprocess.Popen[str]:
        """Starts `command` on the host. All its output goes to `stdout`."""
        named = [
            "ip",
            "netns",
            "exec",
            self.name,
            "unshare",
            "--uts",
            "sh",
            "-c",
            'hostname "$0"; exec "$@"',
            self.name,
        ]
        process = subprocess.Popen(
            [*named, *map(str, command)],
            cwd=ROOT,
            env=environment(self.home, **env),
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def processes(self) -> list[psutil.Process]:
        """All that runs there."""
        told = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        found = []
        for pid in told.stdout.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def die(self) -> None:
        """Ends the host as a power cut does: it loses the network first, then everything is killed."""
        subprocess.run(["ip", "link", "set", f"{self.name}-b", "down"], check=True)
        killed = self.processes()
        for process in killed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(killed, timeout=10)
        for process in self.started:
            process.wait()


@contextlib.contextmanager
def hosts(count: int, home: Path) -> Iterator[list[Host]]:
    """Makes hosts that exist until the block ends. Skips the test if they cannot be made."""
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("hosts are network namespaces, which take root and iproute2")
    tag, net = f"gpt{os.getpid() % 10000}", f"10.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
    bridge, names = f"{tag}-br", [f"{tag}-{i}" for i in range(count)]
    with contextlib.ExitStack() as stack:
        try:
            make(stack, "link", "add", bridge, "type", "bridge", undo=("link", "del", bridge))
            ip("addr", "add", f"{net}.254/24", "dev", bridge)
            ip("link", "set", bridge, "up")
            made = [
                add(stack, Host(name, f"{net}.{i + 1}", f"{net}.254", home), bridge) for i, name in enumerate(names)
            ]
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine makes no network namespaces: {error.stderr.strip()}")
        book = "".join(f"{host.address} {host.name}\n" for host in made)
        for host in made:
            folder = Path("/etc/netns") / host.name  # what `ip netns exec` shows as /etc
            folder.mkdir(parents=True)
            stack.callback(shutil.rmtree, folder)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{book}")
        yield made


def add(stack: contextlib.ExitStack, host: Host, bridge: str) -> Host:
    """Puts `host` on the bridge."""
    inside, outside = f"{host.name}-a", f"{host.name}-b"
    make(stack, "netns", "add", host.name, undo=("netns", "del", host.name))
    make(stack, "link", "add", outside, "type", "veth", "peer", "name", inside, undo=("link", "del", outside))
    stack.callback(host.die)
    ip("link", "set", inside, "netns", host.name)
    ip("link", "set", outside, "master", bridge)
    ip("link", "set", outside, "up")
    ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", inside)
    ip("-n", host.name, "link", "set", inside, "up")
    ip("-n", host.name, "link", "set", "lo", "up")
    return host


def make(stack: contextlib.ExitStack, *command: str, undo: Sequence[str]) -> None:
    """Does `command` now and `undo` when the stack is left."""
    ip(*command)
    stack.callback(subprocess.run, ["ip", *undo], check=False, capture_output=True)


def ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True, text=True)


def start_ray(host: Host, *flags: str, temp: str, cpus: int = 2, **env: str) -> None:
    """Runs `ray start` on that host and waits for it."""
    command = [BIN / "ray", "start", "--block", f"--node-ip-address={host.address}", f"--num-cpus={cpus}"]
    process = host.popen(*command, f"--temp-dir={temp}", "--disable-usage-stats", *flags, **env)
    assert process.stdout
    said: list[Any] = []
    for line in process.stdout:
        said.append(line)
        if "Ray runtime started" in line:
            return
    raise AssertionError(f"Ray did not start on {host.name}:\n{''.join(said)}")


@dataclass
class Machines:
    """Hosts with a Ray over all of them, and a tracking server that each of them reaches."""

    hosts: list[Host]
    tracking: TrackingServer
    cluster: Cluster


@contextlib.contextmanager
def machines(count: int, folder: Path, head_cpus: int = 2) -> Iterator[Machines]:
    """Ray on so many hosts of two CPUs, started as docs/cluster.md says; the first is the head."""
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temp,
        hosts(count, folder / "home") as made,
    ):
        head, *others = made
        tracking = TrackingServer(folder, head.gateway)
        tracking.start()
        try:
            env = NOTICED | {"MLFLOW_TRACKING_URI": tracking.uri}
            haproxy.use_haproxy(env)
            env["RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"] = SILENCE_S
            port, dashboard = 6379, 8265
            first = ("--head", f"--port={port}", f"--dashboard-host={head.address}")
            start_ray(head, *first, temp=temp, cpus=head_cpus, **env)
            for host in others:
                start_ray(host, f"--address={head.address}:{port}", temp=temp, **env)
            tracking.await_answer()
            yield Machines(
                made, tracking, Cluster(f"{head.address}:{port}", f"http://{head.address}:{dashboard}", head.home)
            )
        finally:
            tracking.kill()
