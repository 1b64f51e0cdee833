"""The plan's benchmark compares predictions with runs. The benchmark itself judges the errors, on an idle machine."""

import json

import pytest

from bench import plan
from tests.memory import multiplies_bf16


@pytest.mark.slow
@multiplies_bf16
def test_each_prediction_is_compared_with_a_run(capsys: pytest.CaptureFixture[str]):
    names = ("quick", "gpt2-124m, one sequence")
    found = plan.measure(1, names[:1], names[1:])
    assert set(found) == set(names)
    assert all(ratio > 0 for ratio in found.values())
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == list(names)


@pytest.mark.parametrize(("ratio", "code"), [(1.2, 0), (0.8, 0), (1.3, 1), (0.7, 1)])
def test_a_plan_that_is_off_by_more_than_a_quarter_fails_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ratio: float, code: int
):
    monkeypatch.setattr(plan, "measure", lambda rounds: {"quick": 1.0, "other": ratio})
    assert plan.main([]) == code
    assert json.loads(capsys.readouterr().out)["predicted_over_measured"] == {"quick": 1.0, "other": ratio}
