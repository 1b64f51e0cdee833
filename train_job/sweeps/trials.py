"""The results of a sweep's trials, read from their folders: a ranking, and a table for people, MLflow, spreadsheets.

In: the trials. A trial's folder is a run's folder: `history.jsonl` has its losses, and `trial.json`, written last, how
it ended. Out: rows, best first.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gptcore.errors import RecordError
from train_job.config import TrainConfig
from train_job.files import read_json, write_json
from train_job.session.history import read_history
from train_job.sweeps.space import shown

ENDING = "trial.json"
COLUMNS = ("rank", "trial", "bits_per_byte", "at_step", "steps", "seconds", "end")


@dataclass(frozen=True)
class Ending:
    """How a trial ended. `why` is the limit that was met, "ASHA", or the problem of one that FAILED."""

    status: str
    why: str
    steps: int
    seconds: float
    """Since its workers last started."""

    def __str__(self) -> str:
        return {"FAILED": f"failed: {self.why}"}.get(self.status, f"{self.why} at step {self.steps}")


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: its values and its folder."""

    number: int
    values: dict[str, Any]
    config: TrainConfig
    folder: Path

    @property
    def name(self) -> str:
        """The name of the run and of its folder."""
        return str(self.config.name)

    @property
    def title(self) -> str:
        """The run's name in MLflow."""
        return f"{self.name} {shown(self.values)}"

    def evaluations(self) -> list[dict[str, float]]:
        """The rows with `step` and `bits_per_byte` so far, without step 0."""
        rows = read_history(self.folder / "history.jsonl")
        return [row for row in rows if "bits_per_byte" in row and row["step"] > 0]

    def best(self) -> dict[str, float]:
        """The evaluation with the fewest bits per byte; inf at step 0 if there is none."""
        none = {"step": 0, "bits_per_byte": math.inf}
        return min(self.evaluations(), key=lambda row: row["bits_per_byte"], default=none)

    def ending(self) -> Ending | None:
        """How it ended; None if it has not. Raises RecordError if trial.json is damaged."""
        path, remedy = self.folder / ENDING, "remove it, and the trial goes on when the sweep does"
        if not path.exists():
            return None
        try:
            ending = Ending(**read_json(path, remedy))
            return replace(ending, steps=int(ending.steps), seconds=float(ending.seconds))
        except (TypeError, ValueError):
            raise RecordError(f"{path} is damaged; {remedy}") from None

    def end(self, ending: Ending) -> None:
        """Writes trial.json, so that the trial is not run again."""
        write_json(self.folder / ENDING, asdict(ending))


def ranked(trials: Iterable[Trial]) -> list[tuple[Trial, Ending]]:
    """The trials that have ended, best first, failed ones last."""
    ended = [(trial, ending) for trial in trials if (ending := trial.ending())]
    return sorted(ended, key=lambda pair: (pair[1].status == "FAILED", pair[0].best()["bits_per_byte"], pair[0].number))


def table(trials: Sequence[Trial]) -> dict[str, list[Any]]:
    """A table for MLflow: `columns`, and under `data` a row for each trial that has ended, best first."""
    names = list(trials[0].values)
    data = []
    for rank, (trial, ending) in enumerate(ranked(trials), start=1):
        best, judged = trial.best(), bool(trial.evaluations())
        figures = [round(best["bits_per_byte"], 4), best["step"]] if judged else [None, None]
        rest = [ending.steps, round(ending.seconds, 1), str(ending) if ending.status == "FAILED" else ending.why]
        data.append([rank, trial.name, *figures, *rest, *(trial.values[name] for name in names)])
    return {"columns": [*COLUMNS, *names], "data": data}


def write_table(rows: dict[str, list[Any]], folder: Path) -> list[Path]:
    """Writes `trials.json` and `trials.csv` into the folder; returns their paths."""
    write_json(folder / "trials.json", rows)
    with (folder / "trials.csv").open("w", newline="") as text:
        csv.writer(text).writerows([rows["columns"], *rows["data"]])
    return [folder / "trials.json", folder / "trials.csv"]


def table_text(rows: dict[str, list[Any]]) -> list[str]:
    """The table as aligned lines, without the reasons of failures, which were printed before."""
    end = rows["columns"].index("end")
    lines = [list(map(str, rows["columns"]))]
    for row in rows["data"]:
        cells = ["-" if cell is None else f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in row]
        cells[2] = cells[2] if row[2] is None else f"{row[2]:.4f}"
        cells[end] = cells[end].partition(":")[0]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
