"""The points of a run's loss curve, kept in `history.jsonl`, so that a run that goes on draws the whole of it.

In: events of the loop. Out: rows for `figures.loss_curve`. A step that is repeated after a restart is kept once.
"""

import json
from pathlib import Path

from train_job.files import written_whole
from train_job.loop import Evaluation, Progress


class History:
    """The rows of a file that may hold some already; each row has `step`, `tokens`, `epoch` and a loss."""

    def __init__(self, path: Path) -> None:
        self.path = path
        whole, newline, torn = (path.read_text() if path.exists() else "").rpartition("\n")
        if torn:  # by a crash; the next line must not continue it
            with written_whole(path) as file:
                file.write((whole + newline).encode())
        self.rows: list[dict[str, float]] = [json.loads(line) for line in whole.splitlines()]
        self._last = {kind: row["step"] for row in self.rows for kind in row if kind.endswith("_loss")}

    @property
    def last_step(self) -> int:
        """The last step of which anything is known."""
        return int(max(self._last.values(), default=0))

    def add(self, event: Progress | Evaluation) -> None:
        """Keeps the event's losses, unless those of its step are there already."""
        row: dict[str, float] = {"step": event.step, "tokens": event.tokens, "epoch": event.epoch}
        if isinstance(event, Progress):
            kind, row["train_loss"] = "train_loss", event.loss
        else:
            kind, row["val_loss"], row["bits_per_byte"] = "val_loss", event.loss, event.bits_per_byte
        if event.step <= self._last.get(kind, 0):
            return
        self._last[kind] = event.step
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
