"""What a user sees while a run goes on."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from gptcore.config import model_preset
from train_job.config import build_config
from train_job.session.console import FEW_STEPS, Console, model_text
from train_job.training.events import Evaluation, Progress


def test_a_live_line_is_no_wider_than_the_terminal_and_whole_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    console = Console(tmp_path)
    console.live("0 of 8 trials | 00 step 12, 4.123 bits/byte")
    console.live("0 of 8 trials | 00 step 12, 4.123 bits/byte")  # no news: neither shown nor kept again
    console.close()
    assert capsys.readouterr().out == "\r\x1b[K0 of 8 trials | 00 \n"
    [line] = console.path.read_text().splitlines()
    assert line.endswith("  0 of 8 trials | 00 step 12, 4.123 bits/byte")


SPEAKER = """
import os, sys
from pathlib import Path
from train_job.session.console import Console, lasting_output

with lasting_output():
    console = Console(Path(sys.argv[1]))
    print("begun")
    sys.stdin.readline()
    console.say("nobody reads this")
    print("nor this")
    print("nor this", file=sys.stderr)
    console.close()
sys.exit(7)
"""


@pytest.mark.parametrize("how", ["reader gone", "closed"])
def test_a_closed_output_does_not_stop_the_run_and_the_log_keeps_everything(tmp_path: Path, how: str):
    command = [sys.executable, "-c", SPEAKER, str(tmp_path)]
    if how == "closed":
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdin
    assert process.stdout
    if how == "reader gone":
        assert process.stdout.readline() == b"begun\n"
        process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(60) == 7
    [log] = tmp_path.glob("training_*.log")
    assert log.read_text().endswith("  nobody reads this\n")


NOISE = """
import os, sys
from train_job.session.console import without_log_lines

with without_log_lines():
    os.write(2, b"[2026-11-26 22:55:16,607 W 14 14] network_util.cc:330: Failed to determine local IP\\n")
    os.write(2, b"something that matters\\n")
    print("said meanwhile", file=sys.stderr)
print("said after", file=sys.stderr)
"""


def test_only_log_lines_of_rays_core_are_kept_from_the_terminal():
    shown = subprocess.run([sys.executable, "-c", NOISE], capture_output=True, text=True, check=True).stderr
    assert shown.splitlines() == ["said meanwhile", "something that matters", "said after"]


def progress(step: int, total: int | None) -> Progress:
    return Progress(step, step, 0.1, 3.0, 1.5, 1.0, 1e-3, 1000.0, None, 1.0, total)


@pytest.mark.parametrize(("total", "shown"), [(FEW_STEPS - 1, 5), (FEW_STEPS, 1), (None, 1)])
def test_a_run_of_a_few_steps_shows_every_progress_line_and_a_longer_one_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int | None, shown: int
):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    console = Console(tmp_path)
    for step in range(1, 6):
        console.progress(progress(step, total))
    said = sys.stdout.getvalue()  # type: ignore[attr-defined]
    console.close()
    assert len(said.splitlines()) == shown


def test_the_evaluation_before_training_has_a_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    console = Console(tmp_path)
    first = Evaluation(0, 0, 0.0, 7.6, 3.2, False, 0.1, 0.0)
    console.evaluation(first)
    console.evaluation(first, "the parent")
    console.close()
    untrained, parent = capsys.readouterr().out.splitlines()
    assert untrained.endswith("  before training")
    assert parent.endswith("  the parent")


def test_a_fine_tuned_model_is_labelled_with_its_parent():
    shape = model_preset("quick", 2048)
    assert model_text(build_config({}), shape, 4_262_656).startswith("quick: 4.3M parameters, qwen3, 4 layers")
    child = build_config({"init_from": "models:/gpt/3", "max_steps": 5})
    assert model_text(child, shape, 4_262_656) == (
        "fine-tunes models:/gpt/3 (4.3M parameters, qwen3, 4 layers, 256 wide, context 256)"
    )
