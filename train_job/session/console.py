"""What the person at the keyboard sees: a header, one live progress line, and a log file with all of it.

In: events. Out: text on stdout (one line rewritten in place on a terminal, a new line every few seconds elsewhere,
so that `ray job logs` stays readable) and `training_YYYYMMDD_HHMMSS.log` in the run's folder.
"""

import contextlib
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from gptcore import progress
from gptcore.config import ModelConfig
from gptcore.units import count, duration
from train_job.config import TrainConfig
from train_job.training.events import Evaluation, Progress

LINE_SECONDS = 5.0
"""Progress lines are at least this far apart where they cannot be rewritten in place."""
FEW_STEPS = 50
"""Of a shorter run every progress line is shown: there are a handful."""


class Output:
    """A stream that goes on without its reader: what nobody can read any more is dropped, and stops nothing.

    A pipe's reader may end (`| head -1`, `| tee log` at Ctrl-C) or a terminal may close, and work is worth more than
    its lines. Everything else is the stream's own.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes what can be written; returns its length."""
        try:
            self._stream.write(text)
            if "\n" in text:
                self._stream.flush()
        except (OSError, ValueError):  # no reader, or a closed file
            self._drop()
        return len(text)

    def flush(self) -> None:
        """Flushes, if there is somebody to read it."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self) -> None:
        """From here on to nowhere, below Python too, which would try the rest again as it exits."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Within it, stdout and stderr are such streams; what is closed from the start leads nowhere."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = (Output(stream if stream is not None else nowhere) for stream in before)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


LOG_LINE = re.compile(rb"\[[^]]*\] (\([^)]*\) )?\w+\.cc:\d+: ")
"""As C++ libraries, and so Ray's core, write it."""


@contextlib.contextmanager
def without_log_lines() -> Iterator[None]:
    """Within it, nothing below Python writes to stderr; then what was written is shown, but log lines of C++."""
    try:
        shown = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    before = sys.stderr
    with tempfile.TemporaryFile() as kept, open(shown, "w", buffering=1, closefd=True) as ours:
        before.flush()
        os.dup2(kept.fileno(), 2)
        sys.stderr = Output(ours)
        try:
            yield
        finally:
            os.dup2(shown, 2)
            sys.stderr = before
            kept.seek(0)
            for line in kept:
                if not LOG_LINE.match(line):
                    with contextlib.suppress(OSError):
                        os.write(2, line)


class Console:
    """Prints, and keeps a timestamped copy of every line in the log file. Any thread may speak."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"training_{datetime.now():%Y%m%d_%H%M%S}.log"
        self._log = self.path.open("a", buffering=1, encoding="utf-8")
        self._live = sys.stdout.isatty()
        self._open_line = False
        self._last = 0.0
        self._said = ""
        self._turn = threading.RLock()
        progress.set_output(self.say)

    def say(self, text: str = "") -> None:
        """A line that stays."""
        with self._turn:
            self._keep(text)
            self._write(("\r\x1b[K" if self._open_line else "") + text + "\n")
            self._open_line = False

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
        with self._turn:
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
        progress.set_output(None)
        with self._turn, contextlib.suppress(OSError):
            if self._open_line:
                self._write("\n")
            self._log.close()

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        progress.reset_silence()

    def _keep(self, text: str) -> None:
        if not text or self._log.closed:
            return
        try:
            self._log.write(f"{datetime.now().isoformat(sep=' ', timespec='seconds')}  {text}\n")
        except OSError as error:  # a full disk: no reason to end a run, and none to keep the next lines from a terminal
            with contextlib.suppress(OSError):
                self._log.close()
            self._write(f"warning: {self.path} gets no more lines: {error.strerror}\n")


def model_text(config: TrainConfig, shape: ModelConfig, parameters: int) -> str:
    """What is trained, in a line: the preset's name, or the parent's where a model is fine-tuned."""
    size = f"{count(parameters)} parameters"
    rest = f"{shape.family}, {shape.num_layers} layers, {shape.hidden_size} wide, context {shape.context_length}"
    if config.init_from:
        return f"fine-tunes {config.init_from} ({size}, {rest})"
    return f"{config.preset}: {size}, {rest}"
