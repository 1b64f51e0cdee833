"""The targets of a run, and whether they are reached.

In: a config and the best figures so far. Out: a `TargetStatus` per target. The loop ends a run by it, and the run's
outcome reports when the target was reached, or by how much it was missed.
"""

from dataclasses import dataclass

from train_job.config import TrainConfig

FIGURES = {
    "target_loss": "validation loss",
    "target_bits_per_byte": "validation bits per byte",
    "target_train_loss": "training loss",
}
"""Each target's setting, and the figure it is compared with."""


@dataclass(frozen=True)
class TargetStatus:
    """A target and the lowest figure so far; `best` is inf if there is none yet."""

    target: str
    wanted: float
    best: float

    @property
    def reached(self) -> bool:
        """Whether the best figure is at or below the target."""
        return self.best <= self.wanted

    @property
    def missed_by(self) -> float:
        """How far the best figure is above the target."""
        return max(0.0, self.best - self.wanted)

    @property
    def figure(self) -> str:
        """The figure's name and the target, as printed: `training loss 0.0999`."""
        return f"{FIGURES[self.target]} {self.wanted:g}"


def target_statuses(config: TrainConfig, **best: float) -> tuple[TargetStatus, ...]:
    """The status of each target the run has; `best` gives the best figure for each."""
    return tuple(
        TargetStatus(name, wanted, best[name]) for name in FIGURES if (wanted := getattr(config, name)) is not None
    )
