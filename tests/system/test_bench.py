"""The benchmarks run and print one JSON line last. These tests do not judge the figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import ray_overhead, second_turn, time_to_quality
from tests.refusals import one_error
from tests.system.conftest import ROOT, environment


def last_line(home: Path, *command: str) -> tuple[int, dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment(home), capture_output=True, text=True
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_gpu_benchmark_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    code, report = last_line(tmp_path, "bench.gpu")
    assert (code, report["bench"]) == (0, "gpu")
    assert "torch sees no such device here" in str(report["skipped"])


@pytest.mark.parametrize(("bits", "code"), [("7.9", 0), pytest.param("0.1", 1, marks=pytest.mark.slow)])
def test_time_to_quality_says_whether_the_target_was_reached(
    tmp_path: Path, text_file: Path, bits: str, code: int
) -> None:
    small = ["tokenizer=bytes", "hidden_size=32", "num_layers=1", "max_steps=20", "eval_interval=10"]
    found, report = last_line(
        tmp_path, "bench.time_to_quality", f"--data={text_file}", f"--bpb={bits}", "--set", *small
    )
    assert found == code
    assert report["reached"] is (code == 0)
    assert float(str(report["seconds"])) > 0


def test_the_time_to_quality_of_several_seeds_is_the_median(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [{"seconds": s, "target": 2.1, "reached": s < 60} for s in (42.0, 38.0, 61.0, 40.0, 39.5)]
    summary = time_to_quality.summary(runs, [1, 2, 3, 4, 5])
    assert {name: summary[name] for name in ("seconds", "fastest", "slowest")} == {
        "seconds": 40.0,
        "fastest": 38.0,
        "slowest": None,  # the seed that did not reach the target has no time
    }
    assert (summary["reached_count"], summary["reached"]) == (4, False)
    assert "4 of 5 seeds reach 2.1" in capsys.readouterr().out


def test_each_seed_is_trained(tmp_path: Path, text_file: Path) -> None:
    small = ["tokenizer=bytes", "hidden_size=32", "num_layers=1", "max_steps=4", "eval_interval=4"]
    flags = [f"--data={text_file}", "--bpb=7.9", "--seeds", "1", "2", "--set", *small]
    code, report = last_line(tmp_path, "bench.time_to_quality", *flags)
    assert (code, report["seeds"], report["reached_count"]) == (0, [1, 2], 2)
    one, other = report["runs"]
    assert one["bits_per_byte"] != other["bits_per_byte"]


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--set", "foo"], "--set has 'foo'; expected KEY=VALUE"),
        (["--set", "fooo=1"], "there is no setting 'fooo'"),
        (["--bpb=-1"], "--bpb is -1; expected more than 0"),
        (["--bpb=nan"], "--bpb is nan; expected more than 0"),
        (["--data=no/such/file"], "'no/such/file'"),
    ],
)
def test_time_to_quality_refuses_wrong_arguments_in_one_line(
    flags: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert time_to_quality.main(flags) == 2
    assert answer in one_error(capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.release
def test_the_ray_job_is_compared_with_the_bare_loop(tmp_path: Path, text_file: Path) -> None:
    small = ["tokenizer=bytes", "hidden_size=32", "num_layers=1"]
    code, report = last_line(
        tmp_path, "bench.ray_overhead", f"--data={text_file}", "--turns=2", "--seconds=4", "--set", *small
    )
    assert code == 0
    assert float(str(report["ratio"])) > 0


def test_the_overhead_benchmark_refuses_an_unknown_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert ray_overhead.main(["--set", "hiden_size=32"]) == 2
    assert "Did you mean 'hidden_size'?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.release
def test_the_start_of_a_second_turn_is_measured(tmp_path: Path) -> None:
    small = ["--preset=tiny", "--dtype=float32", "--first-tokens=100", "--more-tokens=8", "--turns=2", "--threads=1"]
    code, report = last_line(tmp_path, "bench.second_turn", *small)
    assert code == 0
    first_text = report["first_text_ms"]
    assert isinstance(first_text, dict)
    assert all(first_text[name] > 0 for name in ("second", "alone", "whole"))
    assert float(str(report["of_new_tokens_alone"])) > 0


def test_the_second_turn_refuses_no_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        second_turn.main(["--more-tokens=0"])
    assert "--more-tokens is 0; expected at least 1" in capsys.readouterr().err
