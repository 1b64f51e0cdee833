"""What a run tells while it trains. The loop yields these; the worker posts them for the driver.

Torch is not imported here, so a process that only passes them on starts fast.
"""

from dataclasses import dataclass, field

from train_job.training.targets import Standing


@dataclass(frozen=True)
class Started:
    """The first event: the workers are there, so many of them, and this many steps were done before."""

    step: int
    workers: int = field(default=1, compare=False)


@dataclass(frozen=True)
class Progress:
    """What the steps since the last Progress did, over all workers."""

    step: int
    tokens: int
    epoch: float
    loss: float
    """Mean training loss since the last Progress, in nats per token."""
    bits_per_byte: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    mfu: float | None
    seconds_left: float
    total_steps: int | None
    """None where only the clock ends the run."""


@dataclass(frozen=True)
class Evaluation:
    """The whole validation split under the weights of this step; step 0 is the model before training."""

    step: int
    tokens: int
    epoch: float
    loss: float
    """Nats per token."""
    bits_per_byte: float
    best: bool
    seconds: float
    trained_seconds: float
    """Seconds spent in steps until now, evaluations and event handling excluded."""


@dataclass(frozen=True)
class CheckpointDue:
    """A moment at which the state should be saved. `loss` is inf unless this step was evaluated."""

    step: int
    loss: float


@dataclass(frozen=True)
class Finished:
    """The last event: which limit ended the run; `stopped` if someone asked."""

    step: int
    reason: str
    seconds: float = field(default=0.0, compare=False)
    """Since the run began, evaluations included, pauses between resumes not."""
    targets: tuple[Standing, ...] = field(default=(), compare=False)
    """How the run stands to each target that it was given."""


Event = Started | Progress | Evaluation | CheckpointDue | Finished
