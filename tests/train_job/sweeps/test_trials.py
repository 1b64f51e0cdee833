"""train_job.sweeps.trials: the results of trials are read from their folders only."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from train_job.config import build_config
from train_job.sweeps.session import prepare_trials
from train_job.sweeps.space import build_sweep
from train_job.sweeps.trials import Ending, Trial, ranked, table, table_text, write_table
from train_job.sweeps.tuning import share


@pytest.fixture
def trials(tmp_path: Path) -> list[Trial]:
    """Four trials: one that ended, a better one that ASHA stopped, one that failed, one that runs."""
    made = []
    for number, bits in enumerate(([3.0, 2.0, 2.5], [1.75], [], [1.0]), start=1):
        values: dict[str, Any] = {"learning_rate": number / 1000}
        config = build_config(values, {"name": f"s-{number:02}"})
        trial = Trial(number, values, config, tmp_path / config.name)  # type: ignore[operator]
        trial.folder.mkdir()
        rows = [{"step": 10 * n, "train_loss": 9.0} for n in (1, 2)]
        rows += [{"step": 20 * n, "val_loss": 3.0, "bits_per_byte": b} for n, b in enumerate(bits, start=1)]
        (trial.folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
        made.append(trial)
    made[0].end(Ending("FINISHED", "max_steps", 60, 12.34))
    made[1].end(Ending("FINISHED", "ASHA", 20, 4.0))
    made[2].end(Ending("FAILED", "the loss is nan at step 3; try less", 3, 1.0))
    return made


def test_trials_are_ranked_by_their_best_evaluation_and_failed_ones_come_last(trials: list[Trial]):
    assert [trial.number for trial, _ in ranked(trials)] == [2, 1, 3]
    assert trials[0].best()["step"] == 40
    assert trials[3].ending() is None


def test_the_table_has_a_row_for_each_trial_that_has_ended(trials: list[Trial]):
    rows = table(trials)
    assert rows["columns"] == [
        "rank", "trial", "bits_per_byte", "at_step", "steps", "seconds", "end", "learning_rate",
    ]  # fmt: skip
    assert rows["data"][0] == [1, "s-02", 1.75, 20, 20, 4.0, "ASHA", 0.002]
    assert rows["data"][1] == [2, "s-01", 2.0, 40, 60, 12.3, "max_steps", 0.001]
    assert rows["data"][2] == [3, "s-03", None, None, 3, 1.0, "failed: the loss is nan at step 3; try less", 0.003]


def test_the_table_is_written_for_mlflow_and_for_spreadsheets(trials: list[Trial], tmp_path: Path):
    as_json, as_csv = write_table(table(trials), tmp_path)
    assert json.loads(as_json.read_text()) == table(trials)
    with as_csv.open(newline="") as file:
        assert [row[1] for row in csv.reader(file)] == ["trial", "s-02", "s-01", "s-03"]


def test_the_columns_of_the_table_are_aligned(trials: list[Trial]):
    lines = table_text(table(trials))
    assert {line.index(word) for line, word in zip(lines, ("end", "ASHA", "max_steps", "failed"), strict=True)} == {
        lines[0].index("end")
    }
    assert "nan at step 3" not in "".join(lines)


def test_every_trial_is_evaluated_as_often_as_the_first(tmp_path: Path):
    (tmp_path / "text.txt").write_text("a few words of text, one line after the other\n" * 200)
    shape = {"tokenizer": "bytes", "num_layers": 1, "num_heads": 1, "hidden_size": 16, "context_length": 16}
    base = shape | {"name": "s", "storage_path": str(tmp_path), "cache_dir": str(tmp_path / "cache"), "batch_size": 2}
    config = build_sweep(
        {"search": {"max_steps": [20, 2000]}, "grid": True, "base": base | {"data": str(tmp_path / "text.txt")}}
    )

    def no_cluster() -> None:
        raise AssertionError("Ray was started for a small text")

    prepared = prepare_trials(config, tmp_path / "s", no_cluster)
    assert [trial.config.max_steps for trial, _ in prepared.values()] == [20, 2000]
    assert {(i.config.log_interval, i.config.eval_interval) for _, i in prepared.values()} == {(4, 5)}


@pytest.mark.parametrize(
    ("workers", "concurrency", "left", "at_once", "cpus"),
    [("1", None, 9, 8, 1), ("1", None, 3, 3, 2), ("2", None, 9, 4, 1), ("1", 2, 9, 2, 4)],
)
def test_as_many_trials_run_at_a_time_as_the_cluster_has_room_for(
    workers: str, concurrency: int | None, left: int, at_once: int, cpus: int
):
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": False, "Resources": {"CPU": 8.0}}]
    config = build_config({"num_workers": workers})
    assert share(config, concurrency, nodes, left, fixed=True) == (at_once, {"CPU": cpus})
