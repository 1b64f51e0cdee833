"""A real Ray cluster on this machine, and the job as a user runs it: a process with a command line."""

import contextlib
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TOKEN = secrets.token_hex(32)


@dataclass(frozen=True)
class Cluster:
    """A cluster from `ray start --head`: the addresses for drivers and for submitted jobs."""

    address: str
    dashboard: str
    home: Path
    temp: Path = Path("/tmp/ray")
    """Ray's temporary folder, where the list of its exporters is."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Ray with its defaults."""
    with started(tmp_path_factory.mktemp("home")) as running:
        yield running


@contextlib.contextmanager
def started(home: Path, bin: Path = BIN, **env: str) -> Iterator[Cluster]:
    """Four CPUs' worth of Ray from `bin`, started as docs/cluster.md says and stopped by its process id."""
    port, dashboard, agent, client = free_ports(4)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:  # socket paths are short
        head = subprocess.Popen(
            [
                bin / "ray",
                "start",
                "--head",
                "--block",
                "--num-cpus=4",
                f"--port={port}",
                "--node-ip-address=127.0.0.1",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard}",
                f"--dashboard-agent-listen-port={agent}",  # its own, because the agent runs submitted jobs
                f"--temp-dir={scratch}",
                f"--ray-client-server-port={client}",
                "--object-store-memory=500000000",  # the default is a third of the free memory for each cluster
                "--disable-usage-stats",
            ],
            cwd=ROOT,
            env=environment(home, RAY_JOB_STOP_WAIT_TIME_S="60", **env),  # as docs/cluster.md advises
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert head.stdout
        said = []
        for line in head.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            raise AssertionError(f"Ray did not start:\n{''.join(said)}")
        yield Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", home, Path(scratch))
        family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)
        head.wait()


def environment(home: Path, **more: str) -> dict[str, str]:
    """This environment with another home, and this Python first on PATH."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "GPT_FOUNDRY"))}
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    return kept | auth | {"GPT_FOUNDRY_HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"} | more


def what_now(said: str) -> dict[str, str]:
    """The last block of commands in a run's output or log, by name."""
    names = "serve it|chat|ask it|see runs|its page|all runs|promote|go on"
    block = said.rpartition("what now")[2]
    return dict(re.findall(rf"^.*?  ({names}) +(\S.*)$", block, re.MULTILINE))


SMALL = [
    "--tokenizer=bytes",
    "--num-layers=2",
    "--num-heads=2",
    "--hidden-size=64",
    "--context-length=64",
    "--batch-size=8",
    "--max-steps=60",
    "--eval-interval=20",
    "--log-interval=5",
    "--sample-tokens=8",
    "--cpus-per-worker=1",
    # So that another world size can be compared: Muon's matrices are bf16, and their rounding grows.
    "--precision=fp32",
    "--optimizer=adamw",
    "--learning-rate=1e-3",
]


@dataclass
class Job:
    """A training job in a process of its own, and the folder of its run."""

    process: subprocess.Popen[str]
    run_dir: Path
    uri: str

    def await_line(self, pattern: str) -> str:
        """Reads the job's output until a line matches. Fails with the output if none does."""
        seen = []
        assert self.process.stdout
        for line in self.process.stdout:
            seen.append(line)
            if re.search(pattern, line):
                return line
        raise AssertionError(f"no line matched {pattern!r} in:\n{''.join(seen)}")

    def finish(self) -> tuple[int, str]:
        """(exit code, the rest of the output). A job that does not end is killed, and the test with it."""
        try:
            output, _ = self.process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, output


Launch = Callable[..., Job]


@contextlib.contextmanager
def launching(cluster: Cluster, text_file: Path) -> Iterator[Launch]:
    """A function that starts `python train_job/run.py` on the cluster. What still runs at the end is killed."""
    jobs: list[Job] = []

    def start(name: str, *flags: str, small: bool = True, **env: str) -> Job:
        arguments = [*(SMALL if small else ()), *(f"--data={text_file}",), f"--name={name}", *flags]
        if any(flag.startswith("--resume") for flag in flags):
            arguments = list(flags)
        process = subprocess.Popen(
            [sys.executable, "train_job/run.py", *arguments],
            cwd=ROOT,
            env=environment(cluster.home, RAY_ADDRESS=cluster.address, **env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        uri = env.get("MLFLOW_TRACKING_URI", f"sqlite:///{cluster.home}/mlflow/mlflow.db")
        jobs.append(Job(process, cluster.home / "runs" / name, uri))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()


@pytest.fixture
def launch(cluster: Cluster, text_file: Path) -> Iterator[Launch]:
    """Starts jobs for one test."""
    with launching(cluster, text_file) as start:
        yield start


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, text_file: Path) -> Job:
    """An undisturbed run, which the others are compared with. It misses its target."""
    with launching(cluster, text_file) as start:
        job = start("undisturbed", "--target-loss=0.5")
        code, output = job.finish()
        assert code == 0, output
        return job
