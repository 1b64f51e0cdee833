"""bench.startup: the phases add up to the whole time and match what happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import startup
from bench.rows import ROWS, STARTUP
from tests.system.conftest import ROOT


def test_phases_add_up_to_the_whole() -> None:
    marks = [("Python", 0.0), ("work", 1.5), ("Python", 4.0), ("", 4.25)]
    assert startup.phases(marks) == {"Python": 1.75, "work": 2.5}


def test_the_median_try_counts() -> None:
    tries = [[("work", 0.0), ("", seconds)] for seconds in (3.0, 9.0, 1.0)]
    assert startup.median_try(tries) == tries[0]
    assert startup.median_try(tries[:2]) == tries[1]


def test_the_time_of_a_mistyped_flag_has_two_phases(tmp_path: Path) -> None:
    found = startup.phases(startup.run(tmp_path, "--nmae=x", code=2))
    assert list(found) == [startup.FIRST, "the error is printed"]
    with pytest.raises(RuntimeError, match="ended with 2, not 0"):
        startup.run(tmp_path, "--nmae=x")


@pytest.mark.slow
@pytest.mark.release
def test_a_run_and_a_service_have_every_phase() -> None:
    command = [sys.executable, "-m", "bench.startup", "--times=1", "--steps=4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    traced = [phase for _, _, phase in startup.TRACED_FUNCTIONS]
    assert [phase for phase in traced if phase not in report["run"]] == []
    assert all(phase in report["run"] for phase in startup.EVENTS.values())
    for service in ("serve", "serve 124M"):
        assert list(report[service]) == [startup.FIRST, *(phase for _, phase in startup.PROCESSES)]
    for row in (row for row in ROWS if row.command == STARTUP):
        assert (row.ours(report) or 0) > 0, row.what
