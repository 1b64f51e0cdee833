"""The report of `python -m bench.gpu`: Markdown tables for docs/performance.md, and what failed."""

from collections.abc import Iterator, Mapping
from typing import Any

Report = Mapping[str, Any]

FIGURES: dict[str, tuple[str, dict[str, str]]] = {
    "training": ("trained", {"tokens_per_second": "tokens/s", "mfu": "MFU", "peak_memory_gib": "peak GiB"}),
    "decoding": (
        "sequences",
        {
            "tokens_per_second": "tokens/s",
            "step_ms": "step, ms",
            "share_of_floor": "share of the floor",
        },
    ),
    "peers": ("peer", {"tokens_per_second": "tokens/s", "mfu": "MFU", "peak_memory_gib": "peak GiB"}),
    "plan": (
        "planned over measured",
        {
            "seconds": "a step, s",
            "measured_rates": "seconds, by measured rates",
            "assumed_rates": "seconds, by assumed rates",
            "memory": "memory",
        },
    ),
}
"""Each table's name in the report, its title, and its columns: a key of a row, and the heading."""


def failures(report: Report) -> list[str]:
    """The names of failed checks and parts, and of plans that are off by more than is allowed."""
    failed = [name for name, check in report.get("checks", {}).items() if check["ok"] is False]
    failed += [f"{part}: {why}" for part, why in report.get("errors", {}).items()]
    for table in FIGURES:
        failed += [f"{table}, {name}: {row['error']}" for name, row in report.get(table, {}).items() if "error" in row]
    if report["machine"]["kind"] == "cuda":
        for name, row in report.get("plan", {}).items():
            failed += [f"plan, {name}: {key} is {row[key]}" for key in _off(row, report["within"])]
    return failed


def _off(row: Report, within: float) -> list[str]:
    """The ratios that are off; of a compiled run the plan knows only the most memory that it can take."""
    off = ["measured_rates"] if abs(row.get("measured_rates", 1.0) - 1) > within else []
    memory = row.get("memory") or 1.0
    return off + ["memory"] * (memory < 1 - within or (memory > 1 + within and not row["compiled"]))


def markdown(report: Report) -> str:
    """All tables."""
    machine = report["machine"]
    return "\n".join([f"{machine['device']}, torch {machine['torch']}, CUDA {machine['cuda']}", "", *_tables(report)])


def _tables(report: Report) -> Iterator[str]:
    if "checks" in report:
        said = {True: "yes", False: "**no**", None: "–"}
        rows = ((name, said[check["ok"]], check["measured"]) for name, check in report["checks"].items())
        yield from _table(("check", "holds", "measured"), rows)
    for name, (title, columns) in FIGURES.items():
        if name in report:
            yield from _figures(title, columns, report[name])
    for part, why in report.get("errors", {}).items():
        yield f"{part}: {why}"


def _figures(title: str, columns: Mapping[str, str], rows: Mapping[str, Report]) -> Iterator[str]:
    def cells(row: Report) -> list[str]:
        if "error" in row:
            return [row["error"], *[""] * (len(columns) - 1)]
        return ["–" if row.get(column) is None else _shown(column, row[column]) for column in columns]

    yield from _table((title, *columns.values()), ((name, *cells(row)) for name, row in rows.items()))


def _shown(column: str, value: float) -> str:
    if column in ("mfu", "share_of_floor"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if column == "tokens_per_second" else f"{value:g}"


def _table(heads: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + " --- |" * len(heads)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""
