"""Claims about what a person sees of a run while it goes on."""

import subprocess
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


SPEAKER = """
import os, sys
from pathlib import Path
from train_job.console import Console, lasting_output

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
def test_output_that_nobody_reads_any_more_stops_nothing_and_the_log_has_it(tmp_path: Path, how: str):
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
from train_job.console import without_log_lines

with without_log_lines():
    os.write(2, b"[2026-11-26 22:55:16,607 W 14 14] network_util.cc:330: Failed to determine local IP\\n")
    os.write(2, b"something that matters\\n")
    print("said meanwhile", file=sys.stderr)
print("said after", file=sys.stderr)
"""


def test_log_lines_of_rays_core_do_not_reach_the_terminal_and_all_else_does():
    shown = subprocess.run([sys.executable, "-c", NOISE], capture_output=True, text=True, check=True).stderr
    assert shown.splitlines() == ["said meanwhile", "something that matters", "said after"]
