"""`make demo`, but for the install: what a newcomer sees first."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.conftest import ROOT, environment


@pytest.mark.slow
def test_the_demo_registers_and_promotes_a_model_and_reuses_it(tmp_path: Path) -> None:
    env = environment(tmp_path, RAY_ADDRESS="local")
    command = [sys.executable, "-m", "train_job.demo"]
    first = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    for words in ("gpt version 1, now @champion", "sample", "make ui", "bits/byte"):
        assert words in first.stdout
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert again.returncode == 0
    assert "run demo is finished" in again.stdout
    assert "gpt version 1" in again.stdout
