"""What the person at the keyboard sees: a header, one live progress line, and a log file with all of it.

In: events. Out: text on stdout (one line rewritten in place on a terminal, a new line every few seconds elsewhere,
so that `ray job logs` stays readable) and `training_YYYYMMDD_HHMMSS.log` in the run's folder.
"""

import contextlib
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path

from gptcore.config import ModelConfig
from train_job.config import TrainConfig
from train_job.loop import Evaluation, Progress

LINE_SECONDS = 5.0
"""Progress lines are at least this far apart where they cannot be rewritten in place."""
FEW_STEPS = 50
"""Of a shorter run every progress line is shown: there are a handful."""


class Console:
    """Prints, and keeps a timestamped copy of every line in the log file."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"training_{datetime.now():%Y%m%d_%H%M%S}.log"
        self._log = self.path.open("a", buffering=1, encoding="utf-8")
        self._live = sys.stdout.isatty()
        self._open_line = False
        self._last = 0.0
        self._said = ""

    def say(self, text: str = "") -> None:
        """A line that stays."""
        self._write(("\r\x1b[K" if self._open_line else "") + text + "\n")
        self._open_line = False
        self._keep(text)

    def progress(self, event: Progress) -> None:
        """The live line."""
        of = f"/{event.total_steps}" if event.total_steps else ""
        self.live(
            f"step {event.step:>5}{of} | loss {event.loss:.4f} | {event.bits_per_byte:.3f} bits/byte | "
            f"{event.tokens_per_second / 1000:.1f}k tokens/s | {duration(event.seconds_left)} left",
            every=event.total_steps is not None and event.total_steps < FEW_STEPS,
        )

    def live(self, text: str, every: bool = False) -> None:
        """A line that the next one replaces on a terminal; else one every LINE_SECONDS, or `every` one."""
        if text == self._said:
            return
        self._said = text
        self._keep(text)
        if self._live:
            self._write("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1])
            self._open_line = True
        elif every or time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            self._write(text + "\n")

    def evaluation(self, event: Evaluation, untrained: str = "before training") -> None:
        """A line per evaluation; `untrained` says what the model of step 0 is."""
        best = "  best so far" if event.best else f"  {untrained}" if event.step == 0 else ""
        self.say(
            f"step {event.step:>5} | validation loss {event.loss:.4f} | {event.bits_per_byte:.4f} bits/byte | "
            f"epoch {event.epoch:.2f}{best}"
        )

    def close(self) -> None:
        """Ends the live line and the log."""
        if self._open_line:
            self._write("\n")
        with contextlib.suppress(OSError):
            self._log.close()

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def _keep(self, text: str) -> None:
        if not text or self._log.closed:
            return
        try:
            self._log.write(f"{datetime.now().isoformat(sep=' ', timespec='seconds')}  {text}\n")
        except OSError as error:  # a full disk: no reason to end a run, and none to keep the next lines from a terminal
            with contextlib.suppress(OSError):
                self._log.close()
            self._write(f"warning: {self.path} gets no more lines: {error.strerror}\n")


def duration(seconds: float) -> str:
    """`m:ss` or `h:mm:ss`; `?` where nothing bounds it."""
    if seconds > 100 * 86400:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def model_text(config: TrainConfig, shape: ModelConfig, parameters: int) -> str:
    """What is trained, in a line: the preset's name, or the parent's where a model is fine-tuned."""
    size = f"{count(parameters)} parameters"
    rest = f"{shape.family}, {shape.num_layers} layers, {shape.hidden_size} wide, context {shape.context_length}"
    if config.init_from:
        return f"fine-tunes {config.init_from} ({size}, {rest})"
    return f"{config.preset}: {size}, {rest}"


def count(number: float) -> str:
    """4262656 -> '4.3M'."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{suffix}"
    return str(round(number))
