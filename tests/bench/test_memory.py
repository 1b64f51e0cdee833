"""The benchmark of memory, on a small model."""

import json

import pytest

from bench import memory


@pytest.mark.slow
def test_the_peaks_of_serving_and_tuning_are_measured_apart(capsys: pytest.CaptureFixture[str]):
    settings = ["--precision", "fp32", "--sequence-length", "64", "--lora-rank", "2"]
    assert memory.main(["--preset", "quick", *settings]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["serve_peak_bytes"] > found["base_bytes"]
    assert found["tune_peak_bytes"] > found["base_bytes"]
    assert 0 < found["adapter_bytes"] < found["base_bytes"] / 10
    assert found["step_seconds"] > 0
