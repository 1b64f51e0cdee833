"""Claims about what a person sees of a run while it goes on."""

import sys
from pathlib import Path

import pytest

from train_job.console import Console


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
