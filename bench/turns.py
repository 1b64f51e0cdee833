"""Measures contestants in turn: A B C A B C …, each in its own process, all with the same number of threads.

A machine's speed drifts. So compared contestants run close together, and a ratio is the median over the turns. Separate
processes keep one library's threads from spinning while another one is measured. A contestant that cannot run here (not
installed, unsupported) is skipped, and reported with the reason.
"""

import importlib.util
import multiprocessing
import os
import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


RunTurn = Callable[[], Any]
"""Runs one turn and returns what it measured."""


class Task(Protocol):
    """The task of every contestant. It is sent to their processes."""

    @property
    def threads(self) -> int:
        """CPU threads per contestant."""
        ...


@dataclass(frozen=True)
class Contestant:
    """One of the things that are compared: its name in the report, its precision, and how its process opens it."""

    name: str
    precision: str
    open: Callable[[Any, str], tuple[RunTurn, str]]
    """(task, precision) -> (run_turn, a note for the report). Raises Unsupported if it cannot run here."""
    needs: tuple[str, ...] = ()
    """Modules that must be installed."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of its process, beside those of the number of threads."""

    @property
    def label(self) -> str:
        return f"{self.name} {self.precision}"


class Unsupported(Exception):
    """A contestant cannot do the task on this machine; the message says why."""


@dataclass(frozen=True)
class Results:
    """For each label: its turns and a note about it, or why it is absent."""

    turns: dict[str, list[Any]]
    notes: dict[str, str]
    absent: dict[str, str]


def run_in_turn(contestants: Sequence[Contestant], task: Task, turns: int) -> Results:
    """Runs one warm-up turn of each contestant, which does not count, then `turns` rounds."""
    results = Results({}, {}, {})
    with ExitStack() as stack:
        connections: dict[str, Connection] = {}
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
            connections[contestant.label], results.notes[contestant.label] = connection, value
        for number in range(turns + 1):
            for contestant in contestants:
                if contestant.label not in connections:
                    continue
                connections[contestant.label].send("turn")
                _, turn = _receive(connections[contestant.label], contestant)
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
    """Starts a process that opens `contestant`, and yields the connection to it. The process ends with the block."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with _environment({name: str(task.threads) for name in THREAD_VARIABLES} | dict(contestant.environment)):
        process = context.Process(target=_run_child, args=(there, contestant, task), daemon=True)
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
    """Changes the environment for a child to inherit, and restores it afterwards."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _run_child(connection: Connection, contestant: Contestant, task: Task) -> None:
    """Runs in the child: opens the contestant, then runs a turn per message until the connection is closed."""
    try:
        run_turn, note = contestant.open(task, contestant.precision)
        connection.send(("ready", note))
        while connection.recv():
            connection.send(("turn", run_turn()))
    except Unsupported as error:
        connection.send(("absent", str(error)))
    except EOFError:
        return
    except Exception:
        connection.send(("failed", traceback.format_exc()))
