"""Explains in one line why workers failed and what to do about it.

In: the exceptions that Ray Train has from its workers. Out: a line for the run's console, without Ray's paragraphs and
addresses. Ray Train's controller calls `Restarts`, which posts the reason to the run's channel.
"""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import UserCallback

SMALLER = "a smaller --micro-batch-size takes less memory"
PRESSURE = ("OutOfMemory", "out of memory", "not enough memory", "can't allocate memory", "low on memory", "OOM kill ")
"""What Ray, torch and CUDA call a lack of memory."""
BEGAN = "raised in its creation task"
"""What Ray says of an actor that could not begin; the error follows."""
GUESSES = re.compile(r"Some common causes include.*", re.DOTALL)
"""Ray's guesses about any process that it lost."""


@dataclass(frozen=True)
class Failure:
    """An event for the driver: workers failed, and why."""

    why: str


class Restarts(UserCallback):
    """Tells the channel why workers failed, before Ray Train starts them again or gives up."""

    def __init__(self, channel: Any) -> None:
        self.channel, self.address, self.kills = channel, ray.util.get_node_ip_address(), kernel_kills()

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called on Ray Train's controller. Linux's kills are known only on the controller's own machine."""
        here = self.address == ray.util.get_node_ip_address() and any(
            f"ip: {self.address}" in str(_inner(error)) for error in worker_exceptions.values()
        )
        self.channel.post.remote(Failure(explained(worker_exceptions, here and kernel_kills() > self.kills)))


def explained(failures: dict[int, Exception], kernel_killed: bool = False) -> str:
    """The most telling of the workers' failures, in one line.

    `failures` is by rank; `kernel_killed`: Linux has killed a process for lack of memory meanwhile.
    """
    causes = [(_cause(error, kernel_killed), rank) for rank, error in sorted(failures.items())]
    if not causes:
        return "a worker failed"
    # One worker's death makes the others fail at the same step, so memory and a lost machine come first.
    for told in ("memory", "machine", "process"):
        for cause, rank in causes:
            if told in cause:
                return f"worker {rank} {cause}"
    cause, rank = causes[0]
    return f"worker {rank} {cause}"


def _inner(error: Exception) -> Exception:
    """The error behind a failed health check, if that is what Ray Train reports."""
    return getattr(error, "health_check_failure", None) or error


def _cause(error: Exception, kernel_killed: bool) -> str:
    error = _inner(error)
    text = GUESSES.sub("", str(error))
    if any(words in text for words in PRESSURE) or isinstance(error, MemoryError):
        return f"was killed or failed for lack of memory; {SMALLER}"
    if "its node has died" in text or type(error).__name__ == "NodeDiedError":
        return "was lost with its machine"
    if "health" in text.lower() and "check" in text.lower():
        return "did not answer Ray's health check"
    kind = type(error).__name__
    if kind in ("ActorDiedError", "RayActorError", "ActorUnavailableError", "WorkerCrashedError") and BEGAN not in text:
        if kernel_killed:
            return f"lost its process: Linux killed it for lack of memory; {SMALLER}"
        return "lost its process: something outside killed it, or it crashed"
    return f"failed: {last_line(error)}"


def last_line(error: BaseException) -> str:
    """The last line of an exception without an address; in Ray's exceptions it names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if "://" not in line), "")
    return re.sub(r"\x1b\[[0-9;]*m", "", said) or type(error).__name__


def why(error: Exception) -> str:
    """The same for the exception that Ray Train or Tune raises in the end."""
    if failures := getattr(error, "worker_failures", None):
        return explained(failures)
    inner = getattr(error, "controller_failure", None) or error
    if any(words in GUESSES.sub("", str(inner)) for words in PRESSURE):
        return f"a process was killed for lack of memory; {SMALLER}"
    if type(inner).__name__ in ("ActorDiedError", "RayActorError") and BEGAN not in str(inner):
        return "a process of Ray's was lost"
    return last_line(inner)


def kernel_kills() -> int:
    """How many processes Linux has killed for lack of memory since boot; 0 if unknown."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
