"""docs/contributing-tour.md is right: its change makes the named test fail, and no other."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.commands import blocks_of, commands_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "contributing-tour.md"
NEEDED = ("gptcore", "train_job", "tests", "pyproject.toml")


def commands(pattern: str) -> list[str]:
    return [command for command in commands_of(PAGE) if re.search(pattern, command)]


def test_the_page_shows_lines_of_the_file_that_it_changes() -> None:
    [change] = commands("^sed ")
    _, old, _, _ = change.split("|")
    file = ROOT / change.split()[-1]
    assert file.read_text(encoding="utf-8").count(old) == 1
    [shown] = blocks_of(PAGE, "python")
    assert old in shown
    assert all(line in file.read_text(encoding="utf-8") for line in shown.splitlines()[1:])


@pytest.mark.slow
def test_the_change_makes_the_named_test_fail_and_no_other(tmp_path: Path) -> None:
    for name in NEEDED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    [change] = commands("^sed ")
    subprocess.run(change, shell=True, cwd=tmp_path, check=True)
    said = output_of(tmp_path, commands("pytest")[0])
    failed = re.findall(r"^FAILED (\S+)", said, re.MULTILINE)
    assert failed == re.findall(r"^FAILED (\S+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE), said
    assert len(failed) == 1
    for line in re.findall(r"^[>E] +(.*)", blocks_of(PAGE, "text")[0], re.MULTILINE):
        assert line in said


def output_of(folder: Path, command: str) -> str:
    """The output of the page's command in a copy of the checkout."""
    env = os.environ | {"PYTHONPATH": str(folder)}
    command = command.replace(".venv/bin/python", sys.executable)
    return subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True).stdout
