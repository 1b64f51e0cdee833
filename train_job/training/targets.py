"""The targets that a run may be given: which figure is to come down to what, and how near it has come.

In: a config and the best figures until now. Out: a `Standing` per target, by which the loop ends a run and its outcome
says when the target was reached, or by how much it was missed.
"""

from dataclasses import dataclass

from train_job.config import TrainConfig

FIGURES = {
    "target_loss": "validation loss",
    "target_bits_per_byte": "validation bits per byte",
    "target_train_loss": "training loss",
}
"""Each target's setting, and what is to come down."""


@dataclass(frozen=True)
class Standing:
    """How a run stands to one of its targets. `best` is the lowest figure until now, inf if there was none."""

    target: str
    wanted: float
    best: float

    @property
    def reached(self) -> bool:
        """Whether the figure was as low as it should be."""
        return self.best <= self.wanted

    @property
    def missed_by(self) -> float:
        """How far the best figure is above the target."""
        return max(0.0, self.best - self.wanted)

    @property
    def figure(self) -> str:
        """The figure and the target, for people: `training loss 0.0999`."""
        return f"{FIGURES[self.target]} {self.wanted:g}"


def standings(config: TrainConfig, **best: float) -> tuple[Standing, ...]:
    """The run's standing to each target it has; `best` names the best figure for each."""
    return tuple(
        Standing(name, wanted, best[name]) for name in FIGURES if (wanted := getattr(config, name)) is not None
    )
