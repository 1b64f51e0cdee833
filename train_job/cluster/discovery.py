"""Finds the Ray that a job runs on: what RAY_ADDRESS names, what `ray start` started on this machine, or its own.

Out: an address that has answered within seconds, or None if the job should start its own Ray. A Ray that a program
started for itself, such as another run or `serve run`, is not joined: it ends with that program. Only `ray start`
writes a certain file into Ray's temporary folder, which tells the two apart.
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

from gptcore.errors import ConfigError
from gptcore.progress import doing
from train_job.cluster.internals import cluster_versions, versions_match

LOOK_SECONDS = 10.0
"""How long an address may take to answer."""
CURRENT = "ray_current_cluster"
"""The file in Ray's temporary folder with the address of the cluster that `ray start` started last."""
TOKEN = "it wants another token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
OWN = "RAY_ADDRESS=local starts a Ray for this job alone"


@dataclass(frozen=True)
class Local:
    """A Ray node on this machine: its cluster's address and its temporary folder."""

    address: str
    temp_dir: Path

    @property
    def is_shared(self) -> bool:
        """Whether `ray start` started it."""
        return written(self.temp_dir) == self.address


def cluster_address(named: str | None) -> str | None:
    """The cluster to join, or None if the job should start its own Ray. `named` is RAY_ADDRESS.

    Raises ConfigError if the named cluster, or the one that `ray start` started here, does not answer.
    """
    if named == "local":
        return None
    if named and named != "auto":
        if "://" in named:
            raise ConfigError(f"RAY_ADDRESS is {named!r}; expected HOST:PORT, auto or local: a job is its own driver")
        _, colon, port = named.rpartition(":")
        if not (colon and port.isdecimal()):
            raise ConfigError(f"RAY_ADDRESS is {named!r}; expected HOST:PORT, auto or local")
        if problem := unanswered(named):
            raise ConfigError(f"RAY_ADDRESS is {named!r}, but no Ray cluster answers there ({problem}); {OWN}")
        return named
    shared = [local for local in running_here() if local.is_shared]
    if not shared:
        if named:
            raise ConfigError(f"RAY_ADDRESS is {named!r}, but `ray start` has started no cluster here; {OWN}")
        return None
    found = max(shared, key=lambda local: (local.temp_dir / CURRENT).stat().st_mtime)  # as Ray does: the latest
    if problem := unanswered(found.address):
        raise ConfigError(
            f"a Ray cluster on this machine, {found.address}, does not answer ({problem}); {OWN}, and `ray stop` "
            "stops your own clusters"
        )
    return found.address


def written(temp_dir: Path) -> str:
    """The address that `ray start` wrote into this temporary folder; empty if there is none."""
    try:
        return (temp_dir / CURRENT).read_text().strip()
    except OSError:
        return ""


def running_here() -> list[Local]:
    """The Ray nodes whose processes are visible on this machine."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or [""]
        if os.path.basename(command[0]) == "raylet":
            flags = dict(part[2:].split("=", 1) for part in command if part.startswith("--") and "=" in part)
            if flags.get("gcs-address") and flags.get("temp_dir"):
                found.append(Local(flags["gcs-address"], Path(flags["temp_dir"])))
    return found


def unanswered(address: str, seconds: float = LOOK_SECONDS) -> str:
    """Why the Ray cluster at this address does not answer; empty if it does."""
    import grpc
    import ray
    from ray.exceptions import AuthenticationError

    try:
        with doing(f"asking the Ray cluster at {address}"):
            cluster = cluster_versions(address, seconds)
    except AuthenticationError:
        return TOKEN
    except grpc.RpcError as error:
        return {
            grpc.StatusCode.DEADLINE_EXCEEDED: f"no answer in {seconds:g} s",
            grpc.StatusCode.UNAUTHENTICATED: TOKEN,
            grpc.StatusCode.UNAVAILABLE: "no Ray listens there",
        }.get(error.code(), error.code().name.lower())
    if cluster and not versions_match(cluster):
        there = f"it runs Ray {cluster['ray_version']} on Python {cluster['python_version']}"
        return f"{there}, and this is Ray {ray.__version__} on Python {platform.python_version()}"
    return ""
