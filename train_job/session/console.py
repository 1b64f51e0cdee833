"""Prints a run's lines and its live progress, and keeps all of it in a log file.

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
from gptcore.lora import check_adapters
from gptcore.units import count, duration
from train_job.config import TrainConfig
from train_job.training.events import Evaluation, Progress

LINE_SECONDS = 5.0
"""The least time between progress lines that cannot be rewritten in place."""
FEW_STEPS = 50
"""A run with fewer steps prints every progress line."""


class Output:
    """A stream whose reader may go away: text that can no longer be written is dropped, and raises nothing.

    A pipe's reader may end (`| head -1`, `| tee log` at Ctrl-C) or a terminal may close; training goes on. Everything
    else behaves as the wrapped stream.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes what can be written; returns the length of `text`."""
        try:
            self._stream.write(text)
            if "\n" in text:
                self._stream.flush()
        except (OSError, ValueError):  # no reader, or a closed file
            self._drop()
        return len(text)

    def flush(self) -> None:
        """Flushes if there still is a reader."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self) -> None:
        """Redirects the stream to /dev/null, its file descriptor too: Python would flush it once more at exit."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Wraps stdout and stderr in `Output` within the block; streams that are closed from the start go to /dev/null."""
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
"""A log line of a C++ library, such as Ray's core."""


@contextlib.contextmanager
def without_log_lines() -> Iterator[None]:
    """Holds back what native code writes to stderr within the block, then prints it without C++ log lines."""
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
    """Prints lines and writes timestamped copies to the log file; safe to use from any thread."""

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
        """Prints a line."""
        with self._turn:
            self._keep(text)
            self._write(("\r\x1b[K" if self._open_line else "") + text + "\n")
            self._open_line = False

    def progress(self, event: Progress) -> None:
        """Updates the live line with training progress."""
        of = f"/{event.total_steps}" if event.total_steps else ""
        self.live(
            f"step {event.step:>5}{of} | loss {event.loss:.4f} | {event.bits_per_byte:.3f} bits/byte | "
            f"{event.tokens_per_second / 1000:.1f}k tokens/s | {duration(event.seconds_left)} left",
            every=event.total_steps is not None and event.total_steps < FEW_STEPS,
        )

    def live(self, text: str, every: bool = False) -> None:
        """Rewrites the live line on a terminal; elsewhere prints a line every LINE_SECONDS, or `every` one."""
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
        """Prints an evaluation; `untrained` describes the model of step 0."""
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
        except OSError as error:  # a full disk must not end the run, nor keep lines from the terminal
            with contextlib.suppress(OSError):
                self._log.close()
            self._write(f"warning: {self.path} gets no more lines: {error.strerror}\n")


def model_text(config: TrainConfig, shape: ModelConfig, parameters: int) -> str:
    """One line about the model: its preset, or its parent if it is fine-tuned, and its size."""
    size = f"{count(parameters)} parameters"
    if config.lora:
        size = f"adapters of {count(check_adapters(shape, config.lora))} parameters for {size}"
    rest = f"{shape.family}, {shape.num_layers} layers, {shape.hidden_size} wide, context {shape.context_length}"
    if config.init_from:
        return f"fine-tunes {config.init_from} ({size}, {rest})"
    return f"{config.preset}: {size}, {rest}"
