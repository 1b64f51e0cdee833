"""A row of `bench.table`: what is measured, by which command, where its report has it, and the target.

A `Figure` reads a number from a report: a path such as "batches/1/floor/matmul_step_ms", or a function. A target is of
the ratio to a peer if a row has one, and else of our figure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Report = dict[str, Any]
Figure = str | Callable[[Report], float]
MORE, LESS = "≥", "≤"


@dataclass(frozen=True)
class Row:
    """One row. `better` says whether the figure should be at least or at most the `target`; None only shows it."""

    section: str
    what: str
    command: tuple[str, ...]
    """Arguments of `python -m`."""
    figure: Figure
    unit: str
    target: float | None = None
    better: str = MORE
    peer: str = ""
    peer_figure: Figure = ""
    ratio_figure: Figure = ""
    floor_figure: Figure = ""

    def ours(self, report: Report) -> float | None:
        return read(self.figure, report)

    def theirs(self, report: Report) -> float | None:
        return read(self.peer_figure, report)

    def ratio(self, report: Report) -> float | None:
        return read(self.ratio_figure, report)

    def floor(self, report: Report) -> float | None:
        return read(self.floor_figure, report)

    def judged(self, report: Report) -> float | None:
        """The figure that the target is of."""
        return self.ratio(report) if self.ratio_figure else self.ours(report)

    @property
    def wanted(self) -> str:
        """The target in words."""
        if self.target is None:
            return "no target"
        return f"{self.better} {self.in_target_unit(self.target)}"

    def in_target_unit(self, value: float) -> str:
        return f"{value:.4g} times" if self.ratio_figure else self.with_unit(value)

    def with_unit(self, value: float | None) -> str:
        """A figure of this row with its unit; empty if there is none."""
        if value is None:
            return ""
        digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return f"{digits}%" if self.unit == "%" else f"{digits} {self.unit}"

    def verdict(self, value: float) -> str:
        """Whether this value meets the target, and by how much it does not."""
        if self.target is None:
            return "–"
        missing = self.target - value if self.better == MORE else value - self.target
        return (
            "met"
            if missing <= 0
            else f"missed by {missing:.3g}"
            if self.ratio_figure
            else f"missed by {self.with_unit(missing)}"
        )

    def absence(self, report: Report) -> str:
        """Why the report lacks the judged figure: null means that the goal was not reached, or a peer is absent."""
        paths = [path for path in (self.figure, self.peer_figure, self.ratio_figure) if isinstance(path, str)]
        if any(path in report and report[path] is None for path in paths):
            return "missed: not reached"
        for label, reason in absent(report).items():
            names = {label, label.partition(" ")[0]}  # with the precision, and without
            if any(names & set(path.split("/")) for path in paths):
                return f"not measured: {label}: {reason}"
        return "not measured: its report has no such figure"


def read(figure: Figure, report: Report) -> float | None:
    """The number, or None if the report does not have it."""
    try:
        if callable(figure):
            return float(figure(report))
        found: Any = report
        for name in figure.split("/"):
            found = found[name]
        return None if isinstance(found, str | bool) else float(found)
    except (LookupError, TypeError, ValueError, ZeroDivisionError):
        return None


def absent(report: Report) -> dict[str, str]:
    """Every contestant that could not be measured, with the reason, at any depth of the report."""
    found: dict[str, str] = {}
    for name, value in report.items():
        if isinstance(value, dict):
            found |= value if name == "absent" else absent(value)
    return found
