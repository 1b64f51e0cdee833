"""The loop with torch alone: it learns, it stops when it should, and a resumed run is the same run."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.errors import TrainingError
from gptcore.package import open_package, save_package
from gptcore.tokenizer import load_tokenizer
from train_job.config import UNBOUNDED, TrainConfig, build_config
from train_job.data.corpus import open_corpus, split
from train_job.data.inputs import build_model, prepare_inputs
from train_job.training.checkpoint import save_checkpoint
from train_job.training.evaluate import bits_per_byte, validation_nats
from train_job.training.events import CheckpointDue, Evaluation, Event, Finished, Progress, Started
from train_job.training.loop import Trainer

Make = Callable[..., Trainer]


def events(trainer: Trainer) -> list[Event]:
    return list(trainer.run())


def of_kind(kind: type, found: list[Event]) -> list[Any]:
    return [event for event in found if isinstance(event, kind)]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in trainer.tensors().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_training_lowers_the_loss_on_text_it_has_not_seen(trainer: Make, family: str, optimizer: str) -> None:
    found = events(trainer(family=family, optimizer=optimizer, max_steps=60, eval_interval=20))
    losses = [e.loss for e in of_kind(Evaluation, found) if e.step]
    assert losses[-1] < losses[0] < math.log(257)
    assert of_kind(Evaluation, found)[-1].best


def test_events_come_in_order_and_cover_every_step(trainer: Make) -> None:
    found = events(trainer(max_steps=8, eval_interval=4, log_interval=3))
    assert [e.step for e in of_kind(Progress, found)] == [3, 6, 8]
    assert [e.step for e in of_kind(Evaluation, found)] == [0, 4, 8]
    assert [e.step for e in of_kind(CheckpointDue, found)] == [4, 8]
    assert found[-1] == Finished(8, "max_steps")


def test_bits_per_byte_counts_every_byte_of_the_split_once(trainer: Make) -> None:
    t = trainer()
    evaluation = t.evaluate()
    with torch.no_grad():
        stream = torch.from_numpy(t.validation.read(0, t.validation.num_tokens))
        T, nats = t.config.context, 0.0
        for start in range(0, len(stream) - 1, T):
            x, y = stream[start : start + T], stream[start + 1 : start + T + 1]
            nats += float(t.model(x[None, : len(y)], y[None]))
    assert evaluation.bits_per_byte == pytest.approx(nats / math.log(2) / t.validation.num_bytes, rel=2e-3)
    assert evaluation.loss == pytest.approx(nats / (len(stream) - 1), rel=2e-3)


def test_evaluation_leaves_the_model_in_training_mode(trainer: Make) -> None:
    t = trainer(dropout=0.1)
    validation_nats(t.model, t.validation, 32, 4)
    assert t.model.training


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_ends_with_identical_weights(trainer: Make, tmp_path: Path, optimizer: str) -> None:
    whole = trainer(dropout=0.1, optimizer=optimizer)
    undisturbed = events(whole)

    first = trainer(dropout=0.1, optimizer=optimizer)
    identity = first.identity("tokenizer")
    for event in first.run():
        if isinstance(event, CheckpointDue):
            save_checkpoint(tmp_path / "c", first.state, identity, first.tensors())
            break
    second = trainer(dropout=0.1, optimizer=optimizer, seed=1337)
    second.restore(tmp_path / "c")
    resumed = events(second)

    assert_same(weights(whole), weights(second))
    assert of_kind(Progress, resumed)[-1].loss == of_kind(Progress, undisturbed)[-1].loss
    assert of_kind(Evaluation, resumed)[-1].loss == of_kind(Evaluation, undisturbed)[-1].loss


def test_gradient_accumulation_takes_the_same_steps(trainer: Make) -> None:
    whole, parts = (
        [e.loss for e in of_kind(Progress, events(trainer(precision="fp32", log_interval=1, **more)))]
        for more in ({}, {"micro_batch_size": 1})
    )
    assert parts == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(max_steps=5), "max_steps"),
        (dict(max_steps=None, max_epochs=0.05), "max_epochs"),
        (dict(max_steps=None, max_tokens=300), "max_tokens"),
        (dict(max_steps=100, max_tokens=300), "max_tokens"),
        (dict(max_steps=10000, max_minutes=0.0001), "max_minutes"),
        (dict(max_steps=50, target_loss=5.6), "target_loss"),
        (dict(max_steps=50, target_bits_per_byte=8.0), "target_bits_per_byte"),
        (dict(max_steps=50, target_train_loss=5.4), "target_train_loss"),
        (dict(max_steps=500, learning_rate=1e-12, optimizer="adamw", patience=1, eval_interval=1), "patience"),
    ],
)
def test_whichever_limit_comes_first_ends_the_run(trainer: Make, settings: dict[str, Any], reason: str) -> None:
    found = events(trainer(**settings))
    assert found[-1].reason == reason  # type: ignore[union-attr]
    assert of_kind(CheckpointDue, found)[-1].step == found[-1].step
    assert math.isfinite(of_kind(CheckpointDue, found)[-1].loss), "the last state is judged before it is kept"


def test_a_training_loss_target_is_reached_by_the_mean_between_two_logs(trainer: Make) -> None:
    t = trainer(max_steps=300, log_interval=4, eval_interval=100, target_train_loss=4.0)
    found = events(t)
    losses = [e.loss for e in of_kind(Progress, found)]
    assert losses[-1] <= 4.0 < min(losses[:-1])
    assert found[-1] == Finished(4 * len(losses), "target_train_loss")
    assert t.state.best_train_loss == losses[-1]
    assert [e.step for e in of_kind(Evaluation, found)] == [0, 4 * len(losses)], "what is kept is judged"


@pytest.mark.parametrize(
    ("steps", "logged", "judged"),
    [(1, [1], [0, 1]), (5, [1, 2, 3, 4, 5], [0, 2, 4, 5]), (20, [4, 8, 12, 16, 20], [0, 5, 10, 15, 20])],
)
def test_a_run_of_a_few_steps_is_logged_as_it_goes(
    trainer: Make, steps: int, logged: list[int], judged: list[int]
) -> None:
    found = events(trainer(max_steps=steps, log_interval=None, eval_interval=None))
    assert [e.step for e in of_kind(Progress, found)] == logged
    assert [e.step for e in of_kind(Evaluation, found)] == judged
    assert [e.step for e in of_kind(CheckpointDue, found)] == judged[1:], "the untrained model is no checkpoint"


def test_the_evaluation_before_training_uses_the_initial_weights_and_changes_no_step(
    trainer: Make, tmp_path: Path
) -> None:
    t = trainer(dropout=0.1)
    first = next(e for e in t.run() if isinstance(e, Evaluation))
    assert (first.step, first.best) == (0, False)
    assert first.loss == pytest.approx(math.log(320), rel=0.05), "nothing was learned: all tokens are as likely"
    assert (t.state.best_loss, t.state.since_best) == (math.inf, 0)
    whole, unjudged = trainer(dropout=0.1), trainer(dropout=0.1)
    unjudged.evaluate = lambda untrained=False: first if untrained else Trainer.evaluate(unjudged)  # type: ignore[method-assign]
    events(whole), events(unjudged)
    assert_same(weights(whole), weights(unjudged))


def test_a_long_run_keeps_the_presets_intervals() -> None:
    quick, mini = build_config({}), build_config({"preset": "mini"})
    assert (quick.intervals(138), quick.intervals(600), quick.intervals(UNBOUNDED)) == ((10, 50), (10, 50), (10, 50))
    assert mini.intervals(200) == (10, 100)
    assert build_config({"eval_interval": 7}).intervals(20) == (4, 7)


def test_a_finished_run_says_when_it_reached_its_target_or_by_how_much_it_missed(trainer: Make) -> None:
    end = events(trainer(target_loss=0.5, target_train_loss=0.1))[-1]
    assert isinstance(end, Finished)
    missed = {standing.target: standing for standing in end.targets}
    assert missed.keys() == {"target_loss", "target_train_loss"}
    assert not any(standing.reached for standing in missed.values())
    assert missed["target_loss"].missed_by == missed["target_loss"].best - 0.5 > 0
    assert missed["target_train_loss"].best < math.inf
    end = events(trainer(target_loss=9.0, target_bits_per_byte=0.1))[-1]
    assert isinstance(end, Finished)
    assert [(s.target, s.reached, s.missed_by > 0) for s in end.targets] == [
        ("target_loss", True, False),
        ("target_bits_per_byte", False, True),
    ]
    assert (end.step, end.reason) == (6, "target_loss")
    assert end.seconds > 0


@pytest.fixture
def child(trainer: Make, small: Callable[..., TrainConfig], tmp_path: Path) -> Callable[..., Trainer]:
    """Makes a Trainer that continues a model after 20 steps, on the same text."""
    parent = trainer(max_steps=20)
    events(parent)
    config, tokenizer = parent.model.config, load_tokenizer("bytes")
    package = save_package(tmp_path / "parent", config, parent.model.state_dict(), tokenizer, {"sequence_length": 32})
    kept = {k: v for k, v in small().flat().items() if k in ("data", "cache_dir", *CHILD)}

    def make(**settings: Any) -> Trainer:
        config = build_config(kept | {"init_from": str(package.path)} | settings)
        inputs = prepare_inputs(config)
        model = build_model(config, inputs.model, package.load_model().state_dict())
        return Trainer(inputs.config, model, inputs.train, inputs.validation, torch.device("cpu"))

    return make


CHILD = ("batch_size", "max_steps", "eval_interval", "log_interval", "warmup_steps", "sample_tokens")


def test_fine_tuning_first_evaluates_the_parent_on_the_new_text(child: Make, tmp_path: Path) -> None:
    t = child()
    corpus = split(open_corpus(t.config.data, "text", tmp_path / "cache"), t.config.val_fraction)[1]
    alone = bits_per_byte(open_package(tmp_path / "parent"), corpus, tmp_path / "cache")
    found = events(t)
    assert [(e.step, e.best) for e in of_kind(Evaluation, found)] == [(0, False), (6, True), (12, True)]
    assert found[1].bits_per_byte == pytest.approx(alone, rel=2e-3)  # type: ignore[union-attr]


def test_the_parents_evaluation_counts_for_no_checkpoint_target_or_patience(child: Make) -> None:
    found = events(child(target_loss=9.0))
    assert [e.step for e in of_kind(CheckpointDue, found)] == [6]
    assert found[-1] == Finished(6, "target_loss")
    worse = child(learning_rate=1.0, matrix_learning_rate=1.0, warmup_steps=0, patience=2, eval_interval=1)
    found = events(worse)
    judged = of_kind(Evaluation, found)
    assert min(judged, key=lambda e: e.loss).step == 0
    assert worse.state.best_step > 0
    assert [e.best for e in judged[:2]] == [False, True]


def test_a_resumed_fine_tuning_run_does_not_evaluate_its_parent_again(child: Make, tmp_path: Path) -> None:
    first = child()
    saved = next(event for event in first.run() if isinstance(event, CheckpointDue))
    identity = first.identity("tokenizer")
    save_checkpoint(tmp_path / "c", first.state, identity, first.tensors())
    second = child()
    second.restore(tmp_path / "c")
    assert [e.step for e in of_kind(Evaluation, events(second))] == [12]
    assert saved.step == 6


def test_a_stop_saves_a_checkpoint_at_once(trainer: Make) -> None:
    polled = iter([False, False, True])
    found = events(trainer(stop_asked=lambda: next(polled)))
    assert found[-2:] == [CheckpointDue(3, math.inf), Finished(3, "stopped")]


def stopped_at(step: int, trainer: Make, folder: Path, **settings: Any) -> Callable[..., Trainer]:
    """Runs until it is stopped after `step` steps. Returns a function that makes the Trainer which resumes it."""
    polled = iter([*[False] * (step - 1), True])
    first = trainer(stop_asked=lambda: next(polled), **settings)
    found = events(first)
    assert found[-1] == Finished(step, "stopped")
    identity = first.identity("tokenizer")
    save_checkpoint(folder, first.state, identity, first.tensors())

    def resumed(**changes: Any) -> Trainer:
        second = trainer(**settings | changes)
        second.restore(folder)
        return second

    return resumed


def judgements(found: list[Event]) -> list[tuple[int, float, bool]]:
    return [(e.step, e.loss, e.best) for e in of_kind(Evaluation, found)]


@pytest.mark.parametrize("step", [5, 6, 7])
def test_a_stop_never_loses_an_evaluation(trainer: Make, tmp_path: Path, step: int) -> None:
    whole = trainer()
    undisturbed = events(whole)
    second = stopped_at(step, trainer, tmp_path / "c")()
    resumed = events(second)
    before = [judgement for judgement in judgements(undisturbed) if judgement[0] < step]
    assert before + judgements(resumed) == judgements(undisturbed)
    assert (second.state.best_loss, second.state.best_step) == (whole.state.best_loss, whole.state.best_step)
    assert [e.loss for e in of_kind(CheckpointDue, resumed)] == [loss for _, loss, _ in judgements(resumed)]


@pytest.mark.parametrize("step", [7, 8, 9])
def test_patience_ends_a_resumed_run_at_the_same_step_as_an_undisturbed_one(
    trainer: Make, tmp_path: Path, step: int
) -> None:
    hopeless = dict(max_steps=500, learning_rate=1e-12, optimizer="adamw", patience=4, eval_interval=2)
    undisturbed = events(trainer(**hopeless))
    resumed = events(stopped_at(step, trainer, tmp_path / "c", **hopeless)())
    assert undisturbed[-1] == resumed[-1] == Finished(10, "patience")


def test_a_run_resumed_to_the_step_it_had_reached_is_evaluated_and_saved(trainer: Make, tmp_path: Path) -> None:
    resumed = stopped_at(5, trainer, tmp_path / "c")
    found = events(resumed(max_steps=5))
    [evaluation] = of_kind(Evaluation, found)
    assert found == [Started(5), evaluation, CheckpointDue(5, evaluation.loss), Finished(5, "max_steps")]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(max_steps=6), "max_steps"),
        (dict(max_minutes=1e-9), "max_minutes"),
        (dict(target_loss=9.0), "target_loss"),
        (dict(target_train_loss=9.0), "target_train_loss"),
    ],
)
def test_a_resumed_run_takes_no_step_past_its_end(
    trainer: Make, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    first = trainer(max_steps=6)
    assert events(first)[-1] == Finished(6, "max_steps")
    identity = first.identity("tokenizer")
    save_checkpoint(tmp_path / "c", first.state, identity, first.tensors())
    second = trainer(**changes)
    second.restore(tmp_path / "c")
    assert events(second) == [Started(6), Finished(6, reason)]


def test_a_nan_loss_stops_the_run_and_names_the_step(trainer: Make) -> None:
    t = trainer(max_steps=20, log_interval=5)
    run = t.run()
    saved = next(event for event in run if isinstance(event, CheckpointDue))
    assert saved.step == 6
    t.batches = _PoisonedAt(t, 8)  # type: ignore[assignment]
    with pytest.raises(TrainingError, match=r"the loss is nan at step 8; the last good checkpoint is kept"):
        next(event for event in run if isinstance(event, CheckpointDue))


class _PoisonedAt:
    """Batches that set the weights to NaN just before the given step (counted from 1)."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        self.trainer, self.step, self.inner = trainer, step, trainer.batches
        self.steps_per_epoch, self.targets = self.inner.steps_per_epoch, self.inner.targets
        self.answered = self.inner.answered

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        if step + 1 == self.step:
            with torch.no_grad():
                self.trainer.model.norm.weight.fill_(math.nan)
        return self.inner.batch(step, rank, world_size)


def test_the_schedule_warms_up_and_cools_down(small: Callable[..., Any]) -> None:
    from train_job.training.optimizer import learning_rate_factor as factor

    for schedule in ("wsd", "linear", "cosine"):
        config = small(schedule=schedule, warmup_steps=10, cooldown_fraction=0.5, min_lr_fraction=0.1)
        path = [factor(config, step, 100) for step in range(100)]
        assert path[0] == pytest.approx(0.1)
        assert max(path) == path[10] == pytest.approx(1.0)
        assert path[-1] == pytest.approx(0.1, abs=0.03)
        assert path[10:] == sorted(path[10:], reverse=True)
    assert [factor(small(schedule="wsd"), step, 100) for step in (20, 39)] == [1.0, 1.0]
