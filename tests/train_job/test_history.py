"""The points of the loss curve outlive the process, each of them once."""

from pathlib import Path

from train_job.history import History
from train_job.loop import Evaluation, Progress


def progress(step: int) -> Progress:
    return Progress(step, 10 * step, step / 8, 1 / step, 1.0, 1.0, 1.0, 1.0, None, 0.0, None)


def evaluation(step: int) -> Evaluation:
    return Evaluation(step, 10 * step, step / 8, 2 / step, 1.0, True, 0.1, 1.0)


def test_a_step_that_is_repeated_after_a_restart_is_kept_once(tmp_path: Path) -> None:
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


def test_a_line_that_a_crash_tore_does_not_harm_the_next(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path).add(progress(1))
    path.write_text(path.read_text() + '{"step": 2, "tok')
    History(path).add(progress(2))
    assert [row["step"] for row in History(path).rows] == [1, 2]
