"""The events of a training run. The loop yields them; the worker sends them to the driver.

This module does not import torch, so a process that only forwards events starts fast.
"""

from dataclasses import dataclass, field

from train_job.training.targets import TargetStatus


@dataclass(frozen=True)
class Started:
    """The first event: the number of workers, and the steps done before this start."""

    step: int
    workers: int = field(default=1, compare=False)


@dataclass(frozen=True)
class Progress:
    """Figures of the steps since the last Progress, over all workers."""

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
    """None if only max_minutes ends the run."""
    answered: float | None = None
    """The share of tokens that were targets, for conversations."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on the whole validation split; step 0 is the model before training."""

    step: int
    tokens: int
    epoch: float
    loss: float
    """Nats per token."""
    bits_per_byte: float
    best: bool
    seconds: float
    trained_seconds: float
    """Seconds spent in steps so far, without evaluations and event handling."""


@dataclass(frozen=True)
class CheckpointDue:
    """The state should be saved now. `loss` is inf unless this step was evaluated."""

    step: int
    loss: float


@dataclass(frozen=True)
class Finished:
    """The last event: the limit or target that ended the run, or `stopped` if a stop was requested."""

    step: int
    reason: str
    seconds: float = field(default=0.0, compare=False)
    """Since the run began, with evaluations, without the pauses between resumes."""
    targets: tuple[TargetStatus, ...] = field(default=(), compare=False)
    """The status of each target of the run."""


Event = Started | Progress | Evaluation | CheckpointDue | Finished
