"""Which checkpoint becomes a run's package."""

from train_job.session.finish import preferred
from train_job.training.checkpoint import TrainState
from train_job.training.storage import StoredCheckpoint
from train_job.training.targets import TargetStatus


def kept(step: int, loss: float | None) -> StoredCheckpoint:
    """A checkpoint of this step. Without a loss, it was not evaluated."""
    judged = {"last_evaluated": step, "last_loss": loss, "best_step": 40} if loss else {}
    return StoredCheckpoint(None, f"checkpoint_{step}", TrainState(step=step, **judged))  # type: ignore[arg-type]


DAMAGED = StoredCheckpoint(None, "checkpoint_damaged", None, "cut")
FOUND = [
    DAMAGED,
    kept(95, None),
    kept(90, 3.9),
    kept(60, 3.5),
    kept(20, 3.1),
]


def steps(targets: list[TargetStatus]) -> list[int]:
    return [found.step for found in preferred(FOUND, targets)]


def test_the_package_has_the_lowest_validation_loss_or_the_next_lowest() -> None:
    assert steps([]) == [20, 60, 90]
    assert steps([TargetStatus("target_loss", 3.5, 3.1)]) == [20, 60, 90]


def test_a_training_loss_target_that_was_reached_decides_instead() -> None:
    assert steps([TargetStatus("target_train_loss", 0.0999, 0.08)]) == [90, 60, 20]
    assert steps([TargetStatus("target_train_loss", 0.0999, 0.2)])[0] == 20, "it was not reached"
