"""The points of a run's loss curve, kept in `history.jsonl`, so that a resumed run draws the whole curve.

In: events of the loop, and MLflow's metrics if the run comes from another machine. Out: rows for `figures.loss_curve`.
A step that is repeated after a restart is kept once.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from train_job.files import storage_problem, written_whole
from train_job.training.events import Evaluation, Progress


def read_history(path: Path) -> list[dict[str, float]]:
    """Reads rows while another process may write them; without a file there are none, and damaged lines are skipped."""
    lines = _content(path).rpartition(b"\n")[0].splitlines()
    return [row for line in lines if (row := _row(line))]


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""  # reading a device would not end


def _row(line: bytes) -> dict[str, float] | None:
    """The row that a line holds; None if it is damaged."""
    with contextlib.suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and "step" in row and all(isinstance(value, int | float) for value in row.values()):
            return row
    return None


class History:
    """The rows of a run, earlier ones included; each has `step`, `tokens`, `epoch` and a loss.

    `damaged` counts lines that were not rows, apart from a last one that a crash cut short. All of them are removed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, read_history(path)
        whole, _, torn = _content(path).rpartition(b"\n")
        self.damaged = len(whole.splitlines()) - len(self.rows)
        if torn or self.damaged:  # the next line must not continue one that is torn
            with written_whole(path) as file:
                file.writelines(json.dumps(row).encode() + b"\n" for row in self.rows)
        self._last = {kind: row["step"] for row in self.rows for kind in row if kind.endswith("_loss")}

    @property
    def last_step(self) -> int:
        """The last step that has a row."""
        return int(max(self._last.values(), default=0))

    @property
    def untrained_bits_per_byte(self) -> float | None:
        """Bits per byte of the model of step 0, the parent in fine-tuning; None if it was not evaluated."""
        return next((row["bits_per_byte"] for row in self.rows if row["step"] == 0 and "bits_per_byte" in row), None)

    def add(self, event: Progress | Evaluation) -> None:
        """Adds a row for the event unless its step has one."""
        row: dict[str, float] = {"step": event.step, "tokens": event.tokens, "epoch": event.epoch}
        if isinstance(event, Progress):
            self._keep("train_loss", row | {"train_loss": event.loss})
        else:
            self._keep("val_loss", row | {"val_loss": event.loss, "bits_per_byte": event.bits_per_byte})

    def recall(self, points: Mapping[str, Mapping[int, float]], tokens_per_step: int, steps_per_epoch: float) -> None:
        """Adds what `tracking.losses` found beyond the last row: the run was on another machine."""
        for kind, beside in (("train_loss", ()), ("val_loss", ("bits_per_byte",))):
            for step in sorted(points[kind]):
                row = {"step": step, "tokens": step * tokens_per_step, "epoch": step / steps_per_epoch}
                self._keep(kind, row | {name: points[name][step] for name in (kind, *beside) if step in points[name]})

    def _keep(self, kind: str, row: dict[str, float]) -> None:
        if row["step"] <= self._last.get(kind, -1):
            return
        self._last[kind] = row["step"]
        self.rows.append(row)
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise (storage_problem(error, self.path.parent) or error) from None
