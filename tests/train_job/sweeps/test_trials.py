"""train_job.sweeps.trials: the results of trials are read from their folders only."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from train_job.config import build_config
from train_job.sweeps.trials import Ending, Trial, ranked, table, table_text, write_table


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
