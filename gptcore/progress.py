"""Progress lines for slow tasks: the first after a few seconds of silence, then more from time to time.

Wrap a task in `with doing("learning bpe:2048"):` and report progress from inside with `at(3, 10)`. Lines go to stderr,
or to another function set with `set_output`. Other output postpones them (`reset_silence`). Of nested tasks, the
innermost is shown.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from gptcore.units import duration

FIRST_SECONDS = 4.0
"""Silence before the first line."""
AGAIN_SECONDS = 30.0
"""Silence before each further line."""

_lock = threading.Condition()
_open: list["Task"] = []
_quiet_since = _ended = time.monotonic()
_watching = False


class Task:
    """A running task: its description, start time and progress."""

    def __init__(self, what: str | Callable[[], str], first_seconds: float = FIRST_SECONDS) -> None:
        self._what, self._began, self._share = what, time.monotonic(), 0.0
        self.due = first_seconds
        """Seconds of silence before its next line."""

    def at(self, done: float, of: float) -> None:
        """Set the progress to `done` of `of`, in any unit."""
        self._share = min(1.0, done / of) if of else 0.0

    def __str__(self) -> str:
        what = self._what() if callable(self._what) else self._what
        seconds, share = time.monotonic() - self._began, self._share
        left = f", {share:.0%}, about {duration(seconds / share - seconds)} left" if share else ""
        return f"...       {what} ({duration(seconds)}{left})"


@contextlib.contextmanager
def doing(
    what: str | Callable[[], str], *, first_seconds: float = FIRST_SECONDS, at_once: bool = False
) -> Iterator[Task]:
    """Write a line after `first_seconds` of silence, then every AGAIN_SECONDS; `at_once`: also at the start."""
    global _quiet_since, _ended, _watching
    task = Task(what, first_seconds)
    if at_once:
        _write_line(f"...       {what() if callable(what) else what}")
        task.due = AGAIN_SECONDS
    with _lock:
        if not _open and time.monotonic() - _ended > 1.0:  # else tasks in quick succession count as one silence
            _quiet_since = time.monotonic()
        _open.append(task)
        if not _watching:
            _watching = True
            threading.Thread(target=_watch, name="progress", daemon=True).start()
        _lock.notify()
    try:
        yield task
    finally:
        with _lock:
            _open.remove(task)
            _ended = time.monotonic()


def at(done: float, of: float) -> None:
    """Set the progress of the innermost task."""
    with _lock:
        if _open:
            _open[-1].at(done, of)


def reset_silence() -> None:
    """Postpone the next line, since other output was written."""
    global _quiet_since
    _quiet_since = time.monotonic()


def set_output(write: Callable[[str], None] | None) -> None:
    """Write lines with `write` from now on; None: to stderr."""
    global _write_line
    _write_line = write or _to_stderr


def _to_stderr(line: str) -> None:
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


_write_line: Callable[[str], None] = _to_stderr


def _watch() -> None:
    """Write lines for tasks that have been silent for too long; runs in a thread."""
    while True:
        with _lock:
            if not _open:
                _lock.wait()
                continue
            left = _quiet_since + _open[-1].due - time.monotonic()
            if left > 0:
                _lock.wait(left)
                continue
            task = _open[-1]
            task.due = AGAIN_SECONDS
        with contextlib.suppress(Exception):  # a failed write must not stop anything
            _write_line(str(task))
        reset_silence()
