"""bench.data and bench.training: both contestants do the same work. These tests do not judge speeds."""

import json
from pathlib import Path

import pytest

from bench import data, training
from tests.refusals import one_error


@pytest.mark.slow
@pytest.mark.usefixtures("gpt2_cache")
def test_the_data_benchmark_has_rates_memory_and_a_second_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["--megabytes", "0.3", "--turns", "1", "--gigabytes", "0.002"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report["contestants"]) == {"ours", "tiktoken"}
    assert all(one["megabytes_per_second"] > 0 for one in report["contestants"].values())
    assert report["peak_mib"] > 0
    assert report["peak_mib_of_an_eighth"] > 0
    assert report["first_run_seconds"] > 0
    assert report["second_run_seconds"] > 0


def test_the_generated_text_has_its_size_and_is_the_same_each_time(tmp_path: Path) -> None:
    one, other = (data.generate(tmp_path / name, 200_000) for name in ("one.txt", "other.txt"))
    assert 200_000 <= one.stat().st_size < 600_000
    assert one.read_bytes() == other.read_bytes()


def test_a_text_that_the_disk_has_no_room_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9})())
    assert data.main(["--gigabytes=2"]) == 2
    assert "--gigabytes is 2, which takes 4.0 GB" in one_error(capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_loops_learn_the_same(precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    sizes = "--preset tiny --vocab-size 400 --batch 2 --context 16 --turns 2 --steps 2 --threads 1"
    assert training.main([*sizes.split(), f"--precision={precision}"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, theirs = (report["contestants"][name] for name in ("ours", "transformers"))
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=0.01)
    assert report["ratio"] > 0


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ("--preset tinny", "Did you mean 'tiny'?"),
        ("--preset tiny --vocab-size 400 --context 129", "--context is 129; expected at most 128, that of tiny"),
    ],
)
def test_the_training_benchmark_names_wrong_input(flags: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert training.main(flags.split()) == 2
    assert answer in one_error(capsys.readouterr().err)
