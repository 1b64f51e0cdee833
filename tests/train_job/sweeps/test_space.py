"""train_job.sweeps.space: the search spaces that a sweep accepts, and the settings of its trials."""

from pathlib import Path
from typing import Any

import pytest

from gptcore.errors import ConfigError
from train_job.config import build_config
from train_job.sweeps.space import build_sweep, described, shown
from train_job.yaml_files import read_yaml

SWEEPS = sorted((Path(__file__).resolve().parents[3] / "train_job" / "sweeps").glob("*.yaml"))
SEARCH: dict[str, Any] = {
    "learning_rate": {"log_uniform": ["1e-3", "1e-1"]},
    "num_layers": {"uniform": [2, 4]},
    "tokenizer": ["bytes", "bpe:512"],
}


def refusal(**said: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        build_sweep(said)
    return str(refused.value)


def test_drawn_values_lie_in_their_ranges_and_reach_both_ends():
    values = build_sweep({"search": SEARCH, "trials": 200}).values()
    assert all(1e-3 <= v["learning_rate"] <= 1e-1 for v in values)
    assert 70 < sum(v["learning_rate"] < 1e-2 for v in values) < 130, "half of them below the middle of the exponents"
    assert {v["num_layers"] for v in values} == {2, 3, 4}
    assert {v["tokenizer"] for v in values} == {"bytes", "bpe:512"}


def test_the_seed_decides_the_draws_and_adding_trials_keeps_the_first_ones():
    few, many = (build_sweep({"search": SEARCH, "trials": n}).values() for n in (5, 9))
    assert many[:5] == few
    assert build_sweep({"search": SEARCH, "trials": 5, "draw_seed": 1}).values() != few


def test_no_two_trials_have_the_same_settings():
    values = build_sweep({"search": {"num_layers": [1, 2], "num_heads": [1, 2]}, "trials": 4}).values()
    assert sorted(shown(v) for v in values) == sorted({shown(v) for v in values})
    assert "only 4 that differ" in refusal(search={"num_layers": [1, 2], "num_heads": [1, 2]}, trials=5)


def test_a_grid_is_every_combination():
    sweep = build_sweep({"search": {"num_layers": [1, 2], "tokenizer": ["bytes", "gpt2"]}, "grid": True})
    assert [shown(v) for v in sweep.values()] == [
        "num_layers=1 tokenizer=bytes", "num_layers=1 tokenizer=gpt2",
        "num_layers=2 tokenizer=bytes", "num_layers=2 tokenizer=gpt2",
    ]  # fmt: skip
    assert "search.learning_rate is a range" in refusal(search=SEARCH, grid=True)


def test_a_value_listed_twice_is_tried_once():
    sweep = build_sweep({"search": {"num_layers": [2, 2, 3]}, "grid": True})
    assert [values["num_layers"] for values in sweep.values()] == [2, 3]


def test_the_shown_values_are_the_ones_that_are_tried():
    for values in build_sweep({"search": SEARCH, "trials": 20}).values():
        said = dict(pair.split("=") for pair in shown(values).split())
        assert {name: type(values[name])(text) for name, text in said.items()} == values
    assert described(SEARCH).startswith("learning_rate 0.001 to 0.1 (log_uniform), num_layers 2 to 4 (uniform), tok")


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (dict(), "search names no setting"),
        (dict(serch={}), "Did you mean 'search'?"),
        (dict(learning_rate=1), "settings of all trials stand under base"),
        (dict(search={"num_layer": [1]}), "Did you mean 'num_layers'?"),
        (dict(search={"num_layers": "two"}), "expected a list of values"),
        (dict(search={"num_layers": []}), "expected a list of values"),
        (dict(search={"beta1": {"loguniform": [0.1, 0.3]}}), "or log_uniform. Did you mean 'log_uniform'?"),
        (dict(search={"beta1": {"uniform": [0.3, 0.1]}}), "expected the lower end first"),
        (dict(search={"beta1": {"uniform": 0.3}}), "expected [low, high]"),
        (dict(search={"weight_decay": {"log_uniform": [0, 1]}}), "expected more than 0"),
        (dict(search={"tokenizer": {"uniform": [1, 2]}}), "tokenizer is not a number"),
        (dict(search={"learning_rate": ["fast"]}), "learning_rate is 'fast'; expected a number"),
        (dict(search={"num_layers": {"uniform": [1, 2.5]}}), "num_layers is 2.5; expected a whole number"),
        (dict(search={"seed": [1]}, base={"seed": 2}), "seed stands under base and under search"),
        (dict(search={"seed": [1]}, base={"sed": 2}), "Did you mean 'seed'?"),
        (dict(search={"seed": [1]}, base=3), "base is 3"),
        (dict(search={"seed": [1]}, base={"resume": "x"}), "--resume NAME on the command line"),
        (dict(search={"seed": [1]}, trials=0), "trials is 0"),
        (dict(search={"seed": [1]}, trials="many"), "trials is 'many'; expected a whole number"),
        (dict(search={"seed": [1]}, reduction=1), "reduction is 1"),
        (
            dict(search={"num_heads": {"uniform": [0, 4]}}),
            "search allows num_heads=0, which is not valid: num_heads is 0",
        ),
        (dict(search={"hidden_size": [256, 100]}, base={"num_heads": 16}), "hidden_size 100 is not divisible"),
        (dict(search={"preset": ["quick", "shakespeare"]}), "different texts (builtin, shakespeare)"),
    ],
)
def test_impossible_search_spaces_are_named(said: dict[str, Any], answer: str):
    assert answer in refusal(**({"trials": 1} | said))


@pytest.mark.parametrize(
    "name", ["name", "resume", "storage_path", "num_workers", "data", "val_fraction", "eval_interval"]
)
def test_settings_that_all_trials_share_cannot_be_searched(name: str):
    assert f"{name} cannot be searched" in refusal(search={name: ["1"]})


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_included_sweeps_can_be_run(path: Path):
    sweep = build_sweep(read_yaml(str(path)))
    for values in sweep.values():
        build_config(sweep.base, values)
    assert "python train_job/sweep.py train_job/sweeps/" in path.read_text()
