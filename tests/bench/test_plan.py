"""The plan against runs on this machine, measured in turn with its rates."""

import pytest

from bench.plan import measure


@pytest.mark.slow
def test_the_plan_is_within_a_quarter_of_measured_runs():
    """Each figure is the median of three rounds, which the machine's moods share."""
    found = measure(3, ("quick, twice as wide", "gpt2 family, AdamW"), ("foundry-124m, sixteen",))
    assert len(found) == 3
    assert found == {name: pytest.approx(1, abs=0.25) for name in found}
