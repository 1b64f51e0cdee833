"""A fault, what is promised when it happens, and what came of it."""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

HEAD = ("fault", "times", "touched", "lost", "told", "back after, median and longest", "promise", "kept?")


@dataclass
class Result:
    """What came of a fault that happened `times` times."""

    times: int = 0
    touched: int = 0
    """Requests, steps or reads during which it happened."""
    unit: str = "requests"
    lost: int = 0
    """What was promised and did not come: a wrong text, a silent cut, a step that is missing or was made twice."""
    told: int = 0
    """Requests that failed as promised: the client got an error that it can see."""
    recovery: list[float] = field(default_factory=list)
    """Seconds until all was well again, for each time."""
    broken: list[str] = field(default_factory=list)
    """The promises that were not kept, in words."""

    def expect(self, kept: bool, otherwise: str) -> None:
        """Notes a promise that was not kept."""
        if not kept:
            self.broken.append(otherwise)


def merged(results: Sequence[Result]) -> Result:
    """What came of a fault in several runs."""
    whole = Result(unit=results[0].unit)
    for one in results:
        whole.times += one.times
        whole.touched += one.touched
        whole.lost += one.lost
        whole.told += one.told
        whole.recovery += one.recovery
        whole.broken += one.broken
    return whole


@dataclass(frozen=True)
class Fault:
    """Something that happens in production."""

    section: str
    name: str
    what: str
    promise: str
    run: Callable[[Any, random.Random], Result]
    """Makes it happen in the section's scene, with random moments and victims from the generator."""
    fits: Callable[[Any], bool] = lambda scene: True
    """Whether it can happen in a scene."""


def row(fault: Fault, result: Result) -> tuple[str, ...]:
    """The cells of a fault in the table."""
    seconds = result.recovery
    back = f"{statistics.median(seconds):.1f} s, {max(seconds):.1f} s" if seconds else ""
    kept = "yes" if not result.broken else "**no**: " + "; ".join(result.broken)
    touched = f"{result.touched:,} {result.unit}"
    return (fault.what, str(result.times), touched, str(result.lost), str(result.told), back, fault.promise, kept)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [HEAD, ("---",) * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(map(cell, cells)) + " |" for cells in lines)


def cell(text: str) -> str:
    """A text on one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")
