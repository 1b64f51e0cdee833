"""Which checkpoint a run's package is made of."""

from train_job.outcome import chosen
from train_job.targets import Standing

SAVED = [("best", {"step": 40, "val_loss": 3.1}), ("last", {"step": 90, "val_loss": 3.9})]


def test_the_package_is_of_the_lowest_validation_loss() -> None:
    assert chosen(SAVED, [])[0] == "best"
    assert chosen(SAVED, [Standing("target_loss", 3.5, 3.1)])[0] == "best"


def test_a_training_loss_that_was_asked_for_and_reached_decides_instead() -> None:
    assert chosen(SAVED, [Standing("target_train_loss", 0.0999, 0.08)])[0] == "last"
    assert chosen(SAVED, [Standing("target_train_loss", 0.0999, 0.2)])[0] == "best", "it was not reached"
