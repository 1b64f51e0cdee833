"""The next replica does not first try a version that killed one; loads are visible and have a time limit."""

import asyncio
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gptcore.engine import EngineSettings
from gptcore.engine.engine import Engine
from gptcore.package import Package
from serve_app.models import load as loading
from serve_app.models.catalog import Models
from serve_app.models.crash_record import ALONE_WAIT_S, FIRST_WAIT_S, LONGEST_WAIT_S, Crashes, CrashRecord
from tests.serve_app.conftest import MakePackage, TestRegistry
from tests.serve_app.models.test_models import ask, running, settings, status

ROOT = Path(__file__).resolve().parents[3]
DIES = """
import os, signal, sys
from pathlib import Path
from serve_app.models.crash_record import CrashRecord
with CrashRecord(sys.argv[1], sys.argv[2], Path(sys.argv[3])).loading(sys.argv[4]):
    os.kill(os.getpid(), signal.SIGKILL)
"""
"""A replica that is killed while it loads."""


def die(folder: Path, source: str, uri: str, version: str) -> None:
    command = [sys.executable, "-c", DIES, source, uri, str(folder), version]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == -signal.SIGKILL


def test_only_a_load_that_killed_its_process_counts_as_a_crash(tmp_path: Path) -> None:
    record = CrashRecord("models:/gpt@champion", "sqlite:///a.db", tmp_path)
    with pytest.raises(ValueError, match="bad files"), record.loading("7"):
        raise ValueError("bad files")
    with record.loading("7"):
        assert CrashRecord("models:/gpt@champion", "sqlite:///a.db", tmp_path).crashes("7") is None  # it is at work
    assert record.crashes("7") is None
    for count in (1, 2):
        die(tmp_path, "models:/gpt@champion", "sqlite:///a.db", "7")
        crashes = record.crashes("7")
        assert crashes is not None
        assert crashes.count == count
    assert record.crashes("8") is None
    assert CrashRecord("models:/gpt@champion", "sqlite:///b.db", tmp_path).crashes("7") is None
    assert record.last_served() is None
    record.record_served("7")
    assert (record.last_served(), record.crashes("7")) == ("7", None)


def test_each_crash_delays_the_next_attempt_up_to_a_day(tmp_path: Path) -> None:
    waits = [Crashes(count, 0.0, tmp_path).retry_at(alone=False) for count in (1, 2, 3, 4, 1000)]
    assert waits == [FIRST_WAIT_S, 6 * FIRST_WAIT_S, 36 * FIRST_WAIT_S, LONGEST_WAIT_S, LONGEST_WAIT_S]
    assert Crashes(1, 0.0, tmp_path).retry_at(alone=True) == ALONE_WAIT_S


def test_an_unwritable_disk_does_not_prevent_a_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    record = CrashRecord("models:/gpt@champion", "", tmp_path / "file")
    with record.loading("7"):
        pass
    record.record_served("7")
    assert (record.last_served(), record.crashes("7")) == (None, None)
    assert "loads are not recorded" in caplog.text


@pytest.mark.anyio
async def test_a_replica_does_not_first_try_a_version_that_killed_another(
    registry: TestRegistry, journal_home: Path
) -> None:
    source, told = "models:/deadly@champion", settings(registry.uri, model="models:/deadly@champion")
    good = registry.publish("deadly", seed=1, promote="never")  # no gate: only the served version is known
    registry.point("deadly", good)
    async with running(told):
        pass
    killer = registry.publish("deadly", seed=2)
    die(journal_home / ".cache" / "loading", source, registry.uri, killer)
    async with running(told) as models:
        known = status(models, "deadly")
        assert (known.state, known.version) == ("ready", good)
        assert re.match(rf"version {killer} was refused: a replica died in a load of it", known.error or "")
        await models.poll()
        assert (await ask(models))[0] == f"deadly@champion v{good}"
        crashes = CrashRecord(source, registry.uri).crashes(killer)
        assert crashes
        assert f"you delete the folder {crashes.folder.parent.name} in GPT_FOUNDRY_HOME" in known.refused[killer]
        shutil.rmtree(crashes.folder)
        await models.poll()
        assert status(models, "deadly").version == killer


@pytest.mark.anyio
async def test_a_version_that_killed_a_replica_is_tried_again_soon_if_there_is_no_other(
    package: Package, journal_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = settings(model=f"{package.path}/../{package.path.name}/.")
    die(journal_home / ".cache" / "loading", told.sources[told.default_model], told.tracking_uri, "")
    models = Models(told)
    await models.start()
    assert "a replica died in a load of it" in (models.describe()[0].error or "")
    monkeypatch.setattr("serve_app.models.crash_record.ALONE_WAIT_S", 0.0)
    await models.poll()
    assert models.ready
    await models.close()


@pytest.mark.anyio
async def test_a_load_is_visible_and_has_a_time_limit(registry: TestRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "CLOSE_SECONDS", 0.01)
    first = registry.publish("endless", seed=1)
    made, let_go, seen = threading.Event(), threading.Event(), []
    engines = 0

    def make(package: Package, told: EngineSettings) -> Engine:
        nonlocal engines
        engines += 1
        if engines == 2:
            made.set()
            let_go.wait(60)
        return Engine(package, told)

    # The limit is reached when the test says so: the first load must not be late on a busy machine.
    told = settings(registry.uri, model="models:/endless@champion", load_seconds=120)
    async with running(told, make_engine=make) as models:
        second = registry.publish("endless", seed=2)
        monkeypatch.setattr(models._models["endless"], "_settings", settings(registry.uri, load_seconds=5.0))
        polling = asyncio.create_task(models.poll())
        await asyncio.to_thread(made.wait, 60)
        seen.append(status(models, "endless"))
        await polling
        assert re.match(rf"loading version {second} since \d{{4}}-\d\d-\d\dT", seen[0].loading or "")
        assert (seen[0].state, seen[0].version) == ("ready", first)
        known = status(models, "endless")
        assert (known.version, known.loading) == (first, None)
        assert "the load took longer than load_seconds (5)" in known.refused[second]
        models._models["endless"].refused.clear()
        await models.poll()  # does not start beside the load that hangs
        assert engines == 2
        let_go.set()
        monkeypatch.setattr(models._models["endless"], "_settings", told)
        async with asyncio.timeout(60):
            while status(models, "endless").version != second:
                await models.poll()
        assert engines == 3


@pytest.mark.anyio
async def test_a_packages_training_facts_cannot_break_the_list_of_models(make_package: MakePackage) -> None:
    from serve_app.models.registry import lineage

    said = {"bits_per_byte": float("nan"), "data": "x" * 10**6, "git_commit": ["a"]}
    found = lineage(said)
    assert (found.bits_per_byte, len(found.data or ""), found.git_commit) == (None, 1000, "['a']")
    assert lineage({"bits_per_byte": 10**400}).bits_per_byte is None
