"""One process at a time owns a run's folder, from the first moment on. A process that dies leaves no lock."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.refusals import PROGRESS, one_error
from tests.train_job.sweeps.test_sweep_input import GOOD
from tests.waiting import eventually
from train_job import run, sweep
from train_job.config import build_config
from train_job.session import begin, lock
from train_job.session.lock import LOCK, Taken, claimed, locked, this_process
from train_job.yaml_files import write_yaml

AT_ONCE = 8


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this machine's runs."""
    monkeypatch.setenv("GPT_FOUNDRY_HOME", str(tmp_path))
    monkeypatch.setattr(run, "ray_cluster", None)
    return tmp_path / "runs"


def begin_run(folder: Path, **settings: Any) -> Path:
    """Creates the files of a run that has begun."""
    folder.mkdir(parents=True)
    config = build_config({"name": folder.name, "storage_path": str(folder.parent)}, settings)
    write_yaml(config.flat(), folder / "config.yaml")
    return folder


def passed(enter: Callable[[], contextlib.AbstractContextManager[Any]]) -> int:
    """Several threads enter again and again at the same time. Returns the largest number inside together."""
    inside, most, counting = 0, 0, threading.Lock()
    together = threading.Barrier(AT_ONCE)

    def one(_: int) -> None:
        nonlocal inside, most
        together.wait()
        with contextlib.suppress(Taken), enter():
            with counting:
                inside += 1
                most = max(most, inside)
            time.sleep(0.002)
            with counting:
                inside -= 1

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, range(10 * AT_ONCE)))
    return most


def test_only_one_of_many_processes_can_start_a_run_at_the_same_time(tmp_path: Path) -> None:
    assert passed(lambda: locked(tmp_path / "twin")) == 1
    assert not (tmp_path / "twin").exists(), "nothing was begun, so nothing is left"


def test_only_one_of_many_processes_can_claim_a_run_at_a_url_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock.random, "uniform", lambda low, high: high * 0.01)
    assert passed(lambda: claimed(tmp_path.as_uri(), "twin", this_process(), {})) <= 1
    assert not list(tmp_path.iterdir())


def test_a_second_process_is_refused_in_one_line_that_names_the_first(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(begin_run(runs / "twin")):
        for flags in (["--name=twin"], ["--resume=twin"]):
            assert run.main(flags) == 2
            said = one_error(capsys.readouterr().err)
            assert said.startswith(f"error: 'twin' is being run by process {os.getpid()} on ")
    assert run.main(["--name=twin"]) == 2
    assert "--resume twin" in capsys.readouterr().err, "it is free again, and its name is not"


def test_a_run_name_is_reserved_before_anything_else_is_written(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with begin.begin({"name": "twin"}):
        assert sorted(path.name for path in (runs / "twin").iterdir()) == [LOCK]
        assert run.main(["--name=twin"]) == 2
    assert "is being run by process" in capsys.readouterr().err
    assert not (runs / "twin").exists()


def test_default_names_made_in_the_same_second_differ(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Now(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(begin, "datetime", Now)
    begin_run(runs / "quick-20260102-030405")
    with begin.begin({}) as (one, _), begin.begin({}) as (two, folder):
        assert (one.name, two.name) == ("quick-20260102-030405-2", "quick-20260102-030405-3")
        assert folder == runs / "quick-20260102-030405-3"


def test_a_sweep_and_its_trials_have_one_owner(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rates.yaml").write_text(GOOD)
    trial = begin_run(runs / "rates" / "rates-01")
    (runs / "rates" / "sweep.yaml").write_text(f"base: {{name: rates, storage_path: {runs}}}\n{GOOD}")
    with locked(runs / "rates"):
        assert sweep.main([str(tmp_path / "rates.yaml"), "--name=rates"]) == 2
        assert sweep.main(["--resume=rates"]) == 2
        assert run.main(["--name=rates"]) == 2
        assert run.main(["--resume=rates-01", f"--storage-path={runs / 'rates'}"]) == 2
    with locked(trial):
        assert sweep.main(["--resume=rates"]) == 2
    said = PROGRESS.sub("", capsys.readouterr().err).splitlines()
    assert [line.split(" by ")[0] for line in said] == ["error: 'rates' is being run"] * 5


HOLD = """
import sys
from pathlib import Path
from train_job.session.begin import begin
with begin({"name": "killed", "storage_path": sys.argv[1]}):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(storage: str, home: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has begun the run `killed`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, storage],
        env=os.environ | {"GPT_FOUNDRY_HOME": str(home)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("url", [False, True])
def test_a_killed_process_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: bool) -> None:
    monkeypatch.setenv("GPT_FOUNDRY_HOME", str(tmp_path / "home"))
    storage = (tmp_path / "kept").as_uri() if url else str(tmp_path / "kept")
    given = {"name": "killed", "storage_path": storage}
    with holder(storage, tmp_path / "home") as process:
        with pytest.raises(Taken, match=f"process {process.pid} on "), begin.begin(given):
            pass
        process.kill()
        process.wait()
        with begin.begin(given):
            pass


def test_a_run_at_a_url_is_locked_for_other_homes_until_its_claim_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = (tmp_path / "kept").as_uri()
    monkeypatch.setenv("GPT_FOUNDRY_HOME", str(tmp_path / "there"))
    with holder(storage, tmp_path / "here") as process:
        with pytest.raises(Taken, match=f"process {process.pid} on "):
            begin.begin({"name": "killed", "storage_path": storage}).__enter__()
        assert not (tmp_path / "there" / "runs" / "killed").exists()
        process.kill()
        process.wait()
    [claim] = (tmp_path / "kept").iterdir()
    with pytest.raises(Taken), begin.begin({"name": "killed", "storage_path": storage}):
        pass
    long_ago = time.time() - lock.STALE_SECONDS - 60
    os.utime(claim, (long_ago, long_ago))
    with begin.begin({"name": "killed", "storage_path": storage}):
        assert not claim.exists()
    assert not list((tmp_path / "kept").iterdir())


def test_a_claim_is_renewed_and_losing_it_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(lock.os, "kill", lambda pid, number: ended.set())
    us = this_process()
    with claimed(tmp_path.as_uri(), "one", us, {}):
        path = tmp_path / f".one.claim-{us['claim']}.json"

        def renewed() -> str | None:  # nothing while it is written
            return lock._parsed(path.read_bytes()).get("renewed")

        first = eventually(renewed, "the claim")
        eventually(lambda: renewed() not in (None, first), "the claim is renewed")
        # A write that has begun brings it back.
        eventually(lambda: path.unlink(missing_ok=True) or ended.wait(0.005), "the run ends")


def test_a_file_system_without_locks_uses_a_claim_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with locked(tmp_path / "one"):
        with pytest.raises(Taken), locked(tmp_path / "one"):
            pass
        assert list(tmp_path.glob(".one.claim-*"))
    with locked(tmp_path / "one"):
        pass
