"""Which Ray a run joins: one from `ray start` or a named one; never one that a program started for itself."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptcore.errors import ConfigError
from train_job.cluster import discovery
from train_job.cluster.discovery import cluster_address, running_here, unanswered


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that accepts connections and never answers, like a stopped server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def raylet(tmp_path: Path, silent: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A process that looks like a Ray node of a cluster whose head does not answer. No other one is visible."""
    flags = [f"--gcs-address={silent}", f"--temp_dir={tmp_path}"]
    code = "print('up', flush=True); input()"
    process = subprocess.Popen(
        ["raylet", "-c", code, *flags], executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout
    assert process.stdout.readline() == b"up\n"
    seen = discovery.psutil.process_iter
    monkeypatch.setattr(
        discovery.psutil, "process_iter", lambda attrs: (one for one in seen(attrs) if one.pid == process.pid)
    )
    yield silent
    process.communicate(b"\n")


def test_a_port_that_does_not_answer_times_out(silent: str) -> None:
    begun = time.monotonic()
    assert unanswered(silent, seconds=0.5) == "no answer in 0.5 s"
    assert time.monotonic() - begun < 30


def test_a_port_where_nothing_listens_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert unanswered(f"127.0.0.1:{port}") == "no Ray listens there"


def test_an_unsupported_address_is_refused_by_name() -> None:
    for named in ("localhost", "ray://127.0.0.1:10001", "127.0.0.1:"):
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS is '{named}'; expected HOST:PORT, auto or local"):
            cluster_address(named)


def test_local_always_starts_a_separate_ray() -> None:
    assert cluster_address("local") is None


def test_a_ray_that_a_program_started_for_itself_is_not_joined(raylet: str) -> None:
    assert [local for local in running_here() if local.address == raylet and not local.is_shared]
    assert cluster_address(None) != raylet  # nor waited for


def test_a_ray_from_ray_start_is_found_and_reported_if_it_does_not_answer(
    raylet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ray_current_cluster").write_text(f"{raylet}\n")
    os.utime(tmp_path / "ray_current_cluster", (2**32, 2**32))  # the latest of all
    monkeypatch.setattr(discovery, "unanswered", lambda address: f"asked {address}")
    with pytest.raises(ConfigError, match=f"{raylet}, does not answer .asked {raylet}.; RAY_ADDRESS=local"):
        cluster_address(None)
