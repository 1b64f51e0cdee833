"""`make bench`: one table from the reports of all commands, and its place in docs/performance.md."""

import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import rows, table
from bench.row import LESS, Row
from bench.table import BEGIN, END, Outcome
from tests.refusals import one_error

ROWS = [
    Row(
        "speed",
        "decoding",
        ("bench.decode",),
        "engine/rate",
        "tokens/s",
        1.4,
        peer="llama.cpp",
        peer_figure="llama.cpp/rate",
        ratio_figure="ratio",
        floor_figure="engine/floor",
    ),
    Row("speed", "a prompt", ("bench.decode",), "engine/prompt", "tokens/s", 100),
    Row("waiting", "a start", ("bench.startup",), lambda report: sum(report["run"].values()), "s", 12, LESS),
    Row("waiting", "an end", ("bench.startup",), "end", "s"),
]
DECODED = {"engine": {"rate": 1488.4, "floor": 0.83, "prompt": 12}, "llama.cpp": {"rate": 1200}, "ratio": 1.241}
STARTED = {"run": {"a": 4.0, "b": 5.5}, "end": 2.25}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page with a place for the table, which is written there instead of into docs."""
    path = tmp_path / "performance.md"
    path.write_text(f"# Performance\n\n{BEGIN}\nold\n{END}\n\n## More\n")
    monkeypatch.setattr(table, "PAGE", path)
    monkeypatch.setattr(table, "ROWS", ROWS)
    monkeypatch.setattr(table, "heading", lambda: "Measured on a Tuesday.")
    return path


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The commands that were run; their reports are ready."""
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str]) -> Outcome:
        commands.append(command)
        return Outcome(DECODED if command == ("bench.decode",) else STARTED, 61.0)

    monkeypatch.setattr(table, "run", run)
    return commands


def row_called(text: str, what: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"| {what} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_whole_table_replaces_the_old_one_and_nothing_else(page: Path, ran: list[Sequence[str]]) -> None:
    assert table.main([]) == 0
    text = page.read_text()
    assert text.startswith(f"# Performance\n\n{BEGIN}\nMeasured on a Tuesday. It took 0 s.\n\n| figure | ours |")
    assert text.endswith(f"`.venv/bin/python -m bench.startup` |\n{END}\n\n## More\n")
    assert "old" not in text
    assert ran == [("bench.decode",), ("bench.startup",)]  # once each, though several rows read them
    wanted = ["decoding", "1,488 tokens/s", "≥ 1.4 times", "llama.cpp", "1,200 tokens/s", "1.241", "83%"]
    assert row_called(text, "decoding") == [*wanted, "missed by 0.159"]
    assert row_called(text, "a prompt")[-1] == "missed by 88 tokens/s"
    assert row_called(text, "a start") == ["a start", "9.5 s", "≤ 12 s", "", "", "", "", "met"]
    assert row_called(text, "an end") == ["an end", "2.25 s", "no target", "", "", "", "", "–"]
    assert table.main([]) == 0
    assert page.read_text() == text


def test_a_part_is_printed_and_not_written(
    page: Path, ran: list[Sequence[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = page.read_text()
    assert table.main(["--only", "waiting"]) == 0
    assert ran == [("bench.startup",)]
    said = capsys.readouterr().out
    assert row_called(said, "a start")[1] == "9.5 s"
    assert "| decoding |" not in said
    assert page.read_text() == before


def test_a_failed_command_is_named_in_its_rows_and_the_others_are_measured(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = [sys.executable, "-c", "import sys; print('so far so good'); sys.exit('error: no llamas')"]
    good = [sys.executable, "-c", f"print('fine'); print({json.dumps(json.dumps(STARTED))})"]
    monkeypatch.setattr(table, "line_of", lambda command: failing if command == ("bench.decode",) else good)
    assert table.main([]) == 1
    assert row_called(page.read_text(), "decoding")[-1] == "not measured: ended with 1: error: no llamas"
    assert row_called(page.read_text(), "a start")[-1] == "met"
    said = capsys.readouterr().out
    assert "[1/2] .venv/bin/python -m bench.decode\n    so far so good\n" in said
    assert re.search(r"\[2/2\] done, \d+ s", said)


def test_a_report_with_an_exit_code_counts_and_says_so(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = [sys.executable, "-c", f"print({json.dumps(json.dumps(DECODED | STARTED))}); raise SystemExit(1)"]
    monkeypatch.setattr(table, "line_of", lambda _: line)
    assert table.main([]) == 1
    assert row_called(page.read_text(), "a start")[-1] == "met; the command ended with 1"


def test_a_quality_that_was_not_reached_is_missed_and_no_failure(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = DECODED | STARTED | {"end": None, "reached": False}
    line = [sys.executable, "-c", f"print({json.dumps(json.dumps(report))}); raise SystemExit(1)"]
    monkeypatch.setattr(table, "line_of", lambda _: line)
    assert table.main([]) == 0
    assert row_called(page.read_text(), "an end")[-1] == "missed: not reached"


def test_a_peer_that_is_absent_is_named(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = {"engine": DECODED["engine"], "absent": {"llama.cpp": "not installed: llama_cpp"}} | STARTED
    monkeypatch.setattr(table, "run", lambda _: Outcome(report, 1.0))
    assert table.main([]) == 1
    cells = row_called(page.read_text(), "decoding")
    assert cells[1] == "1,488 tokens/s"
    assert cells[-1] == "not measured: llama.cpp: not installed: llama_cpp"


def test_a_wrong_section_is_named_with_the_nearest(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(["--only", "wating"]) == 2
    said = one_error(capsys.readouterr().err)
    assert "--only has 'wating'; expected speed, waiting. Did you mean 'waiting'?" in said


def test_a_page_without_its_markers_is_refused_before_anything_runs(
    page: Path, ran: list[Sequence[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    page.write_text(f"# Performance\n{END}\n{BEGIN}\n")
    assert table.main([]) == 2
    assert "has no place for the table" in one_error(capsys.readouterr().err)
    assert ran == []


def test_the_page_has_a_place_for_the_table() -> None:
    before, behind = table.parts_of(table.PAGE, BEGIN, END)
    assert before.startswith("# Performance")
    assert behind


def test_every_row_is_listed_with_an_existing_command_and_its_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert "  waiting: a job of 20 steps of `quick`; ≤ 12 s\n" in said
    for row in rows.ROWS:
        assert f"  {row.section}: {row.what}; " in said
        assert (table.ROOT / f"{row.command[0].replace('.', '/')}.py").exists()
        assert row.peer or not row.ratio_figure
    names = [(row.section, row.what, row.command) for row in rows.ROWS]
    assert len(set(names)) == len(names)


def test_the_flags_of_every_row_exist() -> None:
    for module, *flags in table.commands_of(rows.ROWS):
        parse = getattr(importlib.import_module(module), "parse", None)
        given = parse(flags) if parse else None
        wanted = [row.what for row in rows.ROWS if row.command == (module, *flags) and "prompt_floor" in str(row)]
        assert not wanted or given.prompt_floor, wanted
