"""A Python that cannot run a command says so in one line, and names one that can."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from gptcore import interpreter

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "command",
    [
        ["train_job/run.py", "--name", "x"],
        ["train_job/sweep.py"],
        ["-m", "train_job.plan"],
        ["-m", "train_job.tracking", "uri"],
        ["-m", "gptcore.generate", "x"],
        ["-m", "serve_app.chat"],
        ["-m", "train_job.demo"],
    ],
)
def test_an_environment_without_our_packages_ends_a_command_with_one_line(command: list[str]):
    # -S: no site-packages, as with a Python of the system's.
    ended = subprocess.run([sys.executable, "-S", *command], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    [line] = ended.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable} lacks ")
    assert line.endswith(f".venv/bin/python {' '.join(command)}")


def test_an_old_python_is_named_with_its_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    assert interpreter.problem(()) == "is Python 3.9.18, and this needs 3.11 or newer"
    with pytest.raises(ImportError, match=r"is Python 3\.9\.18, and this needs 3\.11 or newer; use"):
        interpreter.check()  # as a library, because pytest is not one of our commands


def test_a_job_submitted_with_another_python_says_how_to_submit_it(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(interpreter, "ROOT", str(tmp_path))  # what --working-dir uploads has no environment
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    works = 'ray job submit --working-dir . -- "$PWD/.venv/bin/python" train_job/run.py'
    assert interpreter.suggested_command(["train_job/run.py"]) == works


def test_code_that_runs_before_the_check_has_syntax_for_old_pythons():
    for package in ("gptcore/__init__.py", "gptcore/interpreter.py", "train_job/__init__.py"):
        ast.parse((ROOT / package).read_text(encoding="utf-8"), feature_version=(3, 5))
    for script in ("run", "sweep"):
        ast.parse((ROOT / "train_job" / f"{script}.py").read_text(encoding="utf-8"), feature_version=(3, 8))
