"""Slow work prints a line after some silence, the innermost work first; quick work prints nothing."""

import threading

import pytest

from gptcore import progress


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch):
    """The printed lines, with a patience of hundredths of a second."""
    lines: list[str] = []
    came = threading.Event()

    def say(line: str) -> None:
        lines.append(line)
        came.set()

    monkeypatch.setattr(progress, "AGAIN_SECONDS", 0.05)
    progress.set_output(say)
    yield lines, came
    progress.set_output(None)


def test_slow_work_says_what_it_is_and_how_far_it_is(told):
    lines, came = told
    with progress.doing("judging the champion", first_seconds=0.01):
        progress.at(1, 4)
        assert came.wait(10)
        came.clear()
        assert came.wait(10), "and says it again"
    assert "judging the champion (0:00, 25%, about 0:00 left)" in lines[0]


def test_quick_work_prints_nothing(told):
    lines, _ = told
    with progress.doing("something quick", first_seconds=60):
        pass
    assert lines == []


def test_announced_work_is_printed_before_it_begins(told):
    lines, _ = told
    with progress.doing("judging the champion", at_once=True):
        assert lines == ["...       judging the champion"]


def test_the_innermost_of_nested_work_is_printed(told):
    lines, came = told
    with progress.doing("getting ready", first_seconds=60), progress.doing("reading notes.txt", first_seconds=0.01):
        assert came.wait(10)
    assert "reading notes.txt" in lines[0]
    assert not any("getting ready" in line for line in lines)


def test_a_line_that_cannot_be_printed_stops_nothing():
    tried = threading.Event()

    def say(line: str) -> None:
        tried.set()
        raise BrokenPipeError

    progress.set_output(say)
    try:
        with progress.doing("something", first_seconds=0.01):
            assert tried.wait(10)
            tried.clear()
        with progress.doing("something else", first_seconds=0.01):
            assert tried.wait(10)
    finally:
        progress.set_output(None)
