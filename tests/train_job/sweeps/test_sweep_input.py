"""Wrong input to a sweep gives one line that says what to do, and exit code 2, before Ray or anything else starts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.refusals import one_error
from tests.train_job.test_bad_input import TINY
from train_job import sweep

Refused = Callable[..., str]
GOOD = "search: {learning_rate: [0.001, 0.002]}\ntrials: 2\n"


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a sweep, which must refuse its input. Returns its one line."""
    monkeypatch.setenv("GPT_FOUNDRY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def start_ray() -> None:
        raise AssertionError("Ray was started for input that is wrong")

    monkeypatch.setattr(sweep, "ray_cluster", start_ray)

    def call(*flags: str, text: str = GOOD) -> str:
        (tmp_path / "sweep.yaml").write_text(text)
        assert sweep.main([str(tmp_path / "sweep.yaml"), *TINY, *flags]) == 2
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        assert not list((tmp_path / "home" / "runs").glob("*/sweep.yaml")), "something was begun"
        return one_error(said.err)

    return call


def test_a_sweep_without_a_file_and_one_with_a_missing_file_are_refused(
    refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([]) == 2
    assert "train_job/sweeps/quick.yaml" in capsys.readouterr().err
    assert sweep.main(["nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_an_unknown_flag_gets_the_nearest_one_as_a_hint(refused: Refused) -> None:
    assert "Did you mean '--trials'" in refused("--trial=3")


def test_flags_of_the_sweep_and_of_the_run_win_over_the_file(refused: Refused) -> None:
    assert "only 2 that differ" in refused("--trials=3")
    assert "batch_size is 0" in refused("--batch-size=0")


def test_a_searched_setting_cannot_be_given_as_a_flag(refused: Refused) -> None:
    assert "learning_rate stands under base and under search" in refused("--learning-rate=1")


def test_a_missing_text_or_one_too_short_for_a_trial_is_named(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words of text, no more\n" * 40)
    assert "nowhere.txt" in refused("--data=nowhere.txt")
    longer = "search: {context_length: [16, 4096]}\ntrials: 2\n"
    assert "4096" in refused(f"--data={tmp_path / 'short.txt'}", text=longer)


def test_a_missing_sweep_cannot_be_resumed(refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--resume=nothing"]) == 2
    assert "no sweep 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "name"), [("--draw-seed=3", "draw_seed"), ("--batch-size=4", "batch_size")])
def test_a_resumed_sweep_cannot_change_settings_that_decide_its_trials(
    refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, name: str
) -> None:
    folder = tmp_path / "home" / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(f"base: {{name: mine, storage_path: {folder.parent}}}\n{GOOD}")
    assert sweep.main(["--resume=mine", flag]) == 2
    assert f"{name} cannot be given to a sweep that goes on" in capsys.readouterr().err
    assert not (folder / "run.json").exists()
