"""What takes long says so: a line after a few seconds, more now and then, each with how far it has come.

In: `with doing("learning bpe:2048"):` around whatever may take seconds, and `at(3, 10)` from inside it. Out: lines, on
stderr unless somebody `speaks_through` something else, as a run's console and its workers do. They come only when
nothing else was said meanwhile (`reset_silence`), and of nested ones the innermost is told.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from gptcore.units import duration

FIRST_SECONDS = 4.0
"""Of silence before a first line."""
AGAIN_SECONDS = 30.0
"""Of silence before each further one."""

_lock = threading.Condition()
_open: list["Task"] = []
_quiet_since = _ended = time.monotonic()
_watching = False


class Task:
    """One thing that is being done: `what`, since when, and how much of it is done."""

    def __init__(self, what: str | Callable[[], str], first_seconds: float = FIRST_SECONDS) -> None:
        self._what, self._began, self._share = what, time.monotonic(), 0.0
        self.due = first_seconds
        """Seconds of silence after which it is told."""

    def at(self, done: float, of: float) -> None:
        """`done` of `of` are done, whatever they count."""
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
    """Within it, silence is broken after `first_seconds` and then every AGAIN_SECONDS; `at_once`: also at the start."""
    global _quiet_since, _ended, _watching
    task = Task(what, first_seconds)
    if at_once:
        _write_line(f"...       {what() if callable(what) else what}")
        task.due = AGAIN_SECONDS
    with _lock:
        if not _open and time.monotonic() - _ended > 1.0:  # else one thing after the other, all in one silence
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
    """How far the innermost thing has come, for code that does not know what it is part of."""
    with _lock:
        if _open:
            _open[-1].at(done, of)


def reset_silence() -> None:
    """Something else was said: the silence begins anew."""
    global _quiet_since
    _quiet_since = time.monotonic()


def set_output(say: Callable[[str], None] | None) -> None:
    """Has lines go to `say` from now on; None: to stderr."""
    global _write_line
    _write_line = say or _to_stderr


def _to_stderr(line: str) -> None:
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


_write_line: Callable[[str], None] = _to_stderr


def _watch() -> None:
    """Sleeps until somebody has been silent for too long."""
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
        with contextlib.suppress(Exception):  # a line that cannot be said stops nothing
            _write_line(str(task))
        reset_silence()
