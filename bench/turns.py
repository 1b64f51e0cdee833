"""Contestants measured in turn: A B C A B C …, each in a process of its own, all on the same number of threads.

A machine's speed drifts, so what is compared runs close together and a ratio is the median over the turns. Processes
keep one library's threads from spinning while another is measured. A contestant that cannot take part (not installed,
unsupported here) is left out by name, with the reason.
"""

import importlib.util
import multiprocessing
import os
import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


Play = Callable[[], Any]
"""Plays one turn and returns what was measured."""


class Task(Protocol):
    """What is asked of everyone; it travels to their processes."""

    @property
    def threads(self) -> int:
        """CPU threads that each may compute with."""
        ...


@dataclass(frozen=True)
class Contestant:
    """A name for the report, what it computes in, what it needs installed, and how it is opened (in its process)."""

    name: str
    precision: str
    open: Callable[[Any, str], tuple[Play, str]]
    """(task, precision) -> (play, a note for the report). Raises Unsupported if it cannot be done here."""
    needs: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.name} {self.precision}"


class Unsupported(Exception):
    """A contestant cannot do the task on this machine; the message says why."""


@dataclass(frozen=True)
class Results:
    """Of each label: its turns, a note about it, or why it did not take part."""

    turns: dict[str, list[Any]]
    notes: dict[str, str]
    absent: dict[str, str]


def play_in_turn(contestants: Sequence[Contestant], task: Task, turns: int) -> Results:
    """Plays one warm-up turn of each, which is thrown away, then `turns` rounds of all of them."""
    results = Results({}, {}, {})
    with ExitStack() as stack:
        players: dict[str, Connection] = {}
        for contestant in contestants:
            missing = [name for name in contestant.needs if importlib.util.find_spec(name) is None]
            if missing:
                results.absent[contestant.label] = f"not installed: {', '.join(missing)}"
                continue
            connection = stack.enter_context(_process(contestant, task))
            kind, value = _receive(connection, contestant)
            if kind == "absent":
                results.absent[contestant.label] = value
                continue
            players[contestant.label], results.notes[contestant.label] = connection, value
        for number in range(turns + 1):
            for contestant in contestants:
                if contestant.label not in players:
                    continue
                players[contestant.label].send("turn")
                _, turn = _receive(players[contestant.label], contestant)
                if number:
                    results.turns.setdefault(contestant.label, []).append(turn)
    return results


def median_ratio(left: Sequence[float], right: Sequence[float]) -> float:
    """The median over the rounds of left / right."""
    return statistics.median(a / b for a, b in zip(left, right, strict=True))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _receive(connection: Connection, contestant: Contestant) -> tuple[str, Any]:
    try:
        kind, value = connection.recv()
    except EOFError:
        raise SystemExit(f"the process of {contestant.label} died") from None
    if kind == "failed":
        raise SystemExit(f"{contestant.label} failed:\n{value}")
    return kind, value


@contextmanager
def _process(contestant: Contestant, task: Task) -> Iterator[Connection]:
    """A process that has opened `contestant`; it ends when the connection closes."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with _environment({name: str(task.threads) for name in THREAD_VARIABLES}):
        process = context.Process(target=_play, args=(there, contestant, task), daemon=True)
        process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join(10)
        process.kill()
        process.join()


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """The environment with `changes`, for a child to inherit; restored afterwards."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _play(connection: Connection, contestant: Contestant, task: Task) -> None:
    """The child: opens the contestant, then a turn for each message, until the parent hangs up."""
    try:
        play, note = contestant.open(task, contestant.precision)
        connection.send(("ready", note))
        while connection.recv():
            connection.send(("turn", play()))
    except Unsupported as error:
        connection.send(("absent", str(error)))
    except EOFError:
        return
    except Exception:
        connection.send(("failed", traceback.format_exc()))
