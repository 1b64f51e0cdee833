"""The points of the loss curve survive the process, each of them once."""

from pathlib import Path

from train_job.session.history import History
from train_job.training.events import Evaluation, Progress


def progress(step: int) -> Progress:
    return Progress(step, 10 * step, step / 8, 1 / step, 1.0, 1.0, 1.0, 1.0, None, 0.0, None)


def evaluation(step: int) -> Evaluation:
    return Evaluation(step, 10 * step, step / 8, 2 / step, 1.0, True, 0.1, 1.0)


def test_a_step_repeated_after_a_restart_is_kept_once(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    for step in range(1, 101):
        history.add(progress(step))
        if step == 1:
            history.add(evaluation(step))
    again = History(tmp_path / "history.jsonl")
    assert (again.rows, again.last_step) == (history.rows, 100)
    again.add(evaluation(1))
    again.add(progress(60))
    again.add(progress(101))
    assert again.rows == [*history.rows, {"step": 101, "tokens": 1010, "epoch": 101 / 8, "train_loss": 1 / 101}]
    assert History(tmp_path / "history.jsonl").rows == again.rows


def test_the_parents_evaluation_is_stored_as_step_0(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    assert history.untrained_bits_per_byte is None
    for bits in (2.5, 2.6):  # the second, of a worker that was restarted before its first checkpoint
        history.add(Evaluation(0, 0, 0.0, 4.0, bits, False, 0.1, 0.0))
    history.add(evaluation(8))
    assert History(path).untrained_bits_per_byte == 2.5
    assert [row["step"] for row in History(path).rows] == [0, 8]


def test_a_line_cut_off_by_a_crash_does_not_damage_the_next(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path).add(progress(1))
    path.write_text(path.read_text() + '{"step": 2, "tok')
    History(path).add(progress(2))
    assert [row["step"] for row in History(path).rows] == [1, 2]


def test_the_history_from_another_machine_is_complete(tmp_path: Path) -> None:
    whole, here = History(tmp_path / "whole.jsonl"), History(tmp_path / "here.jsonl")
    for step in range(2, 21, 2):
        for event in [progress(step)] + ([evaluation(step)] if step % 4 == 0 else []):
            whole.add(event)
            if step <= 8:
                here.add(event)
    logged = {
        name: {row["step"]: row[name] for row in whole.rows if name in row}
        for name in ("train_loss", "val_loss", "bits_per_byte")
    }
    for history in (here, History(tmp_path / "nothing.jsonl")):
        history.recall(logged, tokens_per_step=10, steps_per_epoch=8)
        in_order = sorted(history.rows, key=lambda row: (row["step"], "val_loss" in row))
        assert in_order == whole.rows
        assert History(history.path).rows == history.rows
        history.recall(logged, tokens_per_step=10, steps_per_epoch=8)
        assert len(history.rows) == len(whole.rows)
