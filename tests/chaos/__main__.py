"""Breaks training and serving on purpose, and counts what is lost: `python -m tests.chaos`, or `make chaos`.

Runs every fault on real processes and prints a line for each as it is done. What a whole run finds is kept by its seed
in docs/reliability.json, and the tables of docs/reliability.md show all seeds together. The same seed gives the same
victims and moments, as far as the machine allows. `--only NAME ...` runs a part and prints it; `--list` shows the
names. The exit code is 1 if a promise was not kept.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.table import heading, parts_of, write_between
from gptcore.cli import heed_interrupts
from gptcore.errors import ConfigError, FoundryError, did_you_mean
from tests.chaos import serving, training
from tests.chaos.fault import Fault, Result, merged, row, table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
RECORD = PAGE.with_suffix(".json")
BEGIN, END = "<!-- tests.chaos: begin -->", "<!-- tests.chaos: end -->"


@dataclass(frozen=True)
class Setting:
    """Where faults happen: training, or a service behind a front, with so many replicas and one of our runners."""

    section: str
    front: str = ""
    replicas: int = 0
    backend: str = ""

    @property
    def title(self) -> str:
        if self.section == "training":
            return "training"
        replicas = "one replica" if self.replicas == 1 else f"{self.replicas} replicas"
        return f"serving, {replicas}, {self.backend} runner, behind {self.front.replace('haproxy', 'HAProxy')}"

    def open(self, scratch: Path) -> Any:
        """A context manager that gives the scene."""
        if self.section == "training":
            return training.site(scratch)
        return serving.scene(self.front, self.replicas, self.backend, scratch)


SETTINGS = [
    Setting("training"),
    Setting("serving", serving.HAPROXY, 3, "native"),
    Setting("serving", serving.HAPROXY, 1, "torch"),
    Setting("serving", serving.PROXY, 3, "torch"),
    Setting("serving", serving.PROXY, 1, "native"),
]
FAULTS: list[Fault] = [*training.FAULTS, *serving.FAULTS]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a promise was not kept, 2 for bad input."""
    arguments = parse(argv)
    try:
        faults = chosen(arguments.only)
        if arguments.list:
            print("\n".join(f"{fault.name:15} {fault.section}: {fault.what}" for fault in faults))
            return 0
        whole = not arguments.only and not arguments.minutes
        if whole:
            parts_of(PAGE, BEGIN, END)  # finds out now that the table has no place
        head, begun = heading(), time.monotonic()
        done = list(run_all(faults, arguments.seed, arguments.minutes * 60 or float("inf")))
        head = f"{head} It took {(time.monotonic() - begun) / 60:.0f} minutes."
        print(f"\nSeed {arguments.seed}. {head}\n\n{shown(done)}")
        if whole:
            keep(arguments.seed, head, done)
            write_between(PAGE, BEGIN, END, all_seeds())
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if any(result.broken for _, _, result in done) else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these faults alone")
    parser.add_argument("--seed", type=int, default=1, help="chooses victims and moments")
    parser.add_argument("--minutes", type=float, default=0, help="begin no fault after so many; 0: run them all")
    parser.add_argument("--list", action="store_true", help="show the faults, and run none")
    return parser.parse_args(argv)


def chosen(names: Sequence[str]) -> list[Fault]:
    """The faults of these names, or all. Raises ConfigError for an unknown one."""
    known = [fault.name for fault in FAULTS]
    for name in names:
        if name not in known:
            raise ConfigError(f"--only has {name!r}; expected {', '.join(known)}.{did_you_mean(name, known)}")
    return [fault for fault in FAULTS if not names or fault.name in names]


def run_all(faults: Sequence[Fault], seed: int, seconds: float) -> Iterator[tuple[Setting, Fault, Result]]:
    """Opens each scene, and makes every fault happen that fits it. Yields what came of each."""
    deadline = time.monotonic() + seconds
    for setting in SETTINGS:
        fitting = [fault for fault in faults if fault.section == setting.section and fault.fits(setting)]
        if not fitting or time.monotonic() > deadline:
            continue
        print(f"{setting.title}: starting", flush=True)
        waiting = list(fitting)
        try:
            with scratch_folder() as scratch, setting.open(scratch) as scene:
                while waiting and time.monotonic() < deadline:
                    yield setting, waiting[0], run(waiting[0], setting, scene, seed)
                    del waiting[0]
        except Exception as error:  # it did not start, or did not end
            traceback.print_exc()
            yield setting, (waiting or fitting)[0], failed(error)


def run(fault: Fault, setting: Setting, scene: Any, seed: int) -> Result:
    """Makes one fault happen. What fails in an unforeseen way is a broken promise, too."""
    begun = time.monotonic()
    try:
        result = fault.run(scene, random.Random(f"{seed} {setting.title} {fault.name}"))
    except Exception as error:
        traceback.print_exc()
        result = failed(error)
    said = "kept" if not result.broken else "NOT KEPT: " + "; ".join(result.broken)
    print(f"  {fault.name}: {result.times} times, {time.monotonic() - begun:.0f} s, {said}", flush=True)
    return result


def failed(error: Exception) -> Result:
    """The result of what ended with an error that nobody foresaw."""
    return Result(broken=[f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"])


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that does not exist yet, in one that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        yield Path(folder) / "scene"


def shown(done: Sequence[tuple[Setting, Fault, Result]]) -> str:
    """A table for each scene. A fault that happened there with several seeds has one row."""
    parts = []
    for title in dict.fromkeys(setting.title for setting, _, _ in done):
        found: dict[Fault, list[Result]] = {}
        for setting, fault, result in done:
            if setting.title == title:
                found.setdefault(fault, []).append(result)
        rows = [row(fault, merged(results)) for fault, results in found.items()]
        parts.append(f"**{title[0].upper()}{title[1:]}**\n\n{table(rows)}")
    return "\n\n".join(parts)


def keep(seed: int, head: str, done: Sequence[tuple[Setting, Fault, Result]]) -> None:
    """Writes down what a whole run has found, in the place of an earlier one with this seed."""
    found = [
        {"setting": setting.title, "fault": fault.name, "result": asdict(result)} for setting, fault, result in done
    ]
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known[str(seed)] = {"head": head, "found": found}
    RECORD.write_text(json.dumps(dict(sorted(known.items(), key=lambda item: int(item[0]))), indent=1) + "\n")


def all_seeds() -> str:
    """What is known of all seeds, as the page shows it. A fault or a setting that is no more is left out."""
    known = json.loads(RECORD.read_text())
    heads = "\n".join(f"- Seed {seed}. {run['head']}" for seed, run in known.items())
    results = {
        (one["setting"], one["fault"], seed): Result(**one["result"])
        for seed, run in known.items()
        for one in run["found"]
    }
    done = [
        (setting, fault, results[where])
        for setting in SETTINGS
        for fault in FAULTS
        for seed in known
        if (where := (setting.title, fault.name, seed)) in results
    ]
    return f"{heads}\n\n{shown(done)}\n"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the clusters are ended too
    heed_interrupts()  # or services would not end
    sys.exit(main())
