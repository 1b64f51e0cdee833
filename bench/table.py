"""Measures every target and writes the table of docs/performance.md: `python -m bench.table`, or `make bench`.

Runs the commands of its rows one after another, each once, and takes the figures from the JSON lines that they print
last. A command that fails leaves rows that say why, as does a peer that is not installed, and the exit code is 1.
`--only SECTION ...` runs a part and prints it, without writing; `--list` shows rows, commands and targets. Run nothing
else at the same time.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import IO

from bench.row import Report, Row
from bench.rows import ROWS
from gptcore.errors import ConfigError, FoundryError, did_you_mean

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- bench.table: begin -->", "<!-- bench.table: end -->"
HEAD = ("figure", "ours", "target", "peer", "peer's figure", "ratio", "share of the floor", "met?")
STOP_SECONDS = 90
INSTRUCTIONS = {
    "amx_int8": "AMX",
    "avx512_bf16": "AVX-512 bf16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx2": "AVX2",
    "asimd": "NEON",
}
"""Flags of /proc/cpuinfo and what people call them, the best first."""


@dataclass(frozen=True)
class Outcome:
    """What became of a command: its report, if it printed one, how long it took, and why it failed, if it did."""

    report: Report | None
    seconds: float
    why: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a command failed or a row could not be measured, 2 for bad input."""
    arguments = parse(argv)
    try:
        rows = chosen(arguments.only)
        if arguments.list:
            print(listed(rows))
            return 0
        if not arguments.only:
            parts_of(PAGE, BEGIN, END)  # finds out now that the table has no place
        head, begun = heading(), time.perf_counter()
        outcomes = run_all(rows)
        text = (
            f"{head} It took {minutes(time.perf_counter() - begun)}.\n\n{table(rows, outcomes)}\n\n{took(outcomes)}\n"
        )
        print(f"\n{text}", end="")
        if not arguments.only:
            write_between(PAGE, BEGIN, END, text)
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    measured = all(not verdict(row, outcomes[row.command]).startswith("not measured") for row in rows)
    return 0 if measured and not any(outcome.why for outcome in outcomes.values()) else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__.splitlines()[0])
    sections = ", ".join(sections_of(ROWS))
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help=f"run these alone: {sections}")
    parser.add_argument("--list", action="store_true", help="show rows, commands and targets, and run nothing")
    return parser.parse_args(argv)


def sections_of(rows: Sequence[Row]) -> list[str]:
    """Their sections, in order."""
    return list(dict.fromkeys(row.section for row in rows))


def chosen(sections: Sequence[str]) -> list[Row]:
    """The rows of these sections, or all. Raises ConfigError for an unknown one."""
    known = sections_of(ROWS)
    for section in sections:
        if section not in known:
            raise ConfigError(f"--only has {section!r}; expected {', '.join(known)}.{did_you_mean(section, known)}")
    return [row for row in ROWS if not sections or row.section in sections]


def listed(rows: Sequence[Row]) -> str:
    """Each command with its rows and their targets."""
    lines = []
    for command in commands_of(rows):
        lines.append(shown(command))
        lines += [f"  {row.section}: {row.what}; {row.wanted}" for row in rows if row.command == command]
    return "\n".join(lines)


def commands_of(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The commands of the rows, each once, in order."""
    return list(dict.fromkeys(row.command for row in rows))


def shown(command: Sequence[str]) -> str:
    """A command as a user types it."""
    return " ".join((".venv/bin/python", "-m", *command))


# --- running ----------------------------------------------------------------------------------------------------


def run_all(rows: Sequence[Row]) -> dict[tuple[str, ...], Outcome]:
    """Runs every command once, and says how each one ended."""
    commands, outcomes = commands_of(rows), {}
    for number, command in enumerate(commands, start=1):
        print(f"[{number}/{len(commands)}] {shown(command)}", flush=True)
        outcomes[command] = outcome = run(command)
        print(f"[{number}/{len(commands)}] {outcome.why or 'done'}, {minutes(outcome.seconds)}", flush=True)
    return outcomes


def run(command: Sequence[str]) -> Outcome:
    """Runs `python -m` with these arguments, and shows what it prints as it comes, apart from the JSON."""
    begun, last = time.perf_counter(), ""
    with tempfile.TemporaryFile("w+") as errors, started(command, errors) as process:
        for line in process.stdout or ():
            last = line.rstrip()
            if last and not last.startswith("{"):
                print(f"    {last}", flush=True)
        code = process.wait()
        seconds = time.perf_counter() - begun
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    report = read_report(last)
    missed = report is not None and report.get("reached") is False  # bench.time_to_quality ends with 1 then
    if report is not None and (not code or missed):
        return Outcome(report, seconds)
    for line in said[-20:]:
        print(f"    {line}", flush=True)
    why = f"ended with {code}" + (f": {said[-1]}" if said and report is None else "")
    return Outcome(report, seconds, why if code else "printed no report")


@contextlib.contextmanager
def started(command: Sequence[str], errors: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """The command's process, which ends with the block."""
    pipe = subprocess.PIPE
    with subprocess.Popen(line_of(command), cwd=ROOT, stdout=pipe, stderr=errors, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
                process.kill()


def line_of(command: Sequence[str]) -> list[str]:
    """What the system runs for a command."""
    return [sys.executable, "-u", "-m", *command]


def read_report(line: str) -> Report | None:
    """The JSON object in a line, or None."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"


# --- showing ----------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], outcomes: Mapping[tuple[str, ...], Outcome]) -> str:
    """The Markdown table, with a line for each section's name."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for section in sections_of(rows):
        lines.append((f"**{section}**", *[""] * (len(HEAD) - 1)))
        lines += [line(row, outcomes[row.command]) for row in rows if row.section == section]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def line(row: Row, outcome: Outcome) -> tuple[str, ...]:
    """The cells of one row."""
    report = outcome.report or {}
    ratio, floor = row.ratio(report), row.floor(report)
    return (
        row.what,
        row.with_unit(row.ours(report)),
        row.wanted,
        row.peer,
        row.with_unit(row.theirs(report)),
        "" if ratio is None else f"{ratio:.3f}",
        "" if floor is None else f"{floor:.0%}",
        verdict(row, outcome),
    )


def verdict(row: Row, outcome: Outcome) -> str:
    """Met, missed by how much, or why it is not known."""
    if outcome.report is None:
        return f"not measured: {outcome.why}"
    value = row.judged(outcome.report)
    found = row.absence(outcome.report) if value is None else row.verdict(value)
    return found + (f"; the command {outcome.why}" if outcome.why else "")


def took(outcomes: Mapping[tuple[str, ...], Outcome]) -> str:
    """The commands and how long each took."""
    lines = [f"| {minutes(outcome.seconds)} | `{shown(command)}` |" for command, outcome in outcomes.items()]
    return "\n".join(["| took | command |", "|---|---|", *lines])


def heading() -> str:
    """When and on what this is measured."""
    from bench.decode import machine  # imports torch, which --list has no use for

    found = machine(os.cpu_count() or 1, "cpu")
    return (
        f"Measured on {date.today():%Y-%m-%d} at commit {commit()}: {found['cpu']}, {found['cores']} cores, best "
        f"instructions {instructions()}, torch {found['torch']}; load before: {found['load_before']}."
    )


def commit() -> str:
    """The commit that is measured, and whether files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" (modified)" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def instructions() -> str:
    """The best instructions for matrix products that the processor says it has."""
    with contextlib.suppress(OSError):
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
        return next((name for flag, name in INSTRUCTIONS.items() if flag in words), "unknown")
    return "unknown"


# --- the page ---------------------------------------------------------------------------------------------------


def parts_of(page: Path, begin: str, end: str) -> tuple[str, str]:
    """The page before and behind the table. Raises ConfigError if it does not have each marker once, in order."""
    text = page.read_text(encoding="utf-8")
    before, begins, rest = text.partition(begin)
    _, ends, behind = rest.partition(end)
    if not begins or not ends or begin in rest or end in before + behind:
        raise ConfigError(f"{page} has no place for the table; expected a line {begin!r} and, below it, {end!r}")
    return before, behind


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replaces what is between the markers."""
    before, behind = parts_of(page, begin, end)
    page.write_text(f"{before}{begin}\n{text}{end}{behind}", encoding="utf-8")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the command is ended too
    sys.exit(main())
