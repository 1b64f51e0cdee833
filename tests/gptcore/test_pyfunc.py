"""The model that MLflow calls: it accepts prompts in every shape, and gives one continuation each."""

from typing import Any

import pandas as pd
import pytest

from gptcore.errors import ConfigError
from gptcore.package import Package
from gptcore.pyfunc import _load_pyfunc
from gptcore.sampling import SamplingParams, generate_text


@pytest.mark.parametrize(
    "model_input",
    [
        pd.DataFrame({"prompt": ["to be", "or not"]}),
        pd.DataFrame({"prompt": ["to be", "or not"]})["prompt"],
        {"prompt": ["to be", "or not"]},
        [{"prompt": "to be"}, {"prompt": "or not"}],
        ["to be", "or not"],
    ],
    ids=["frame", "series", "dict", "list of dicts", "list"],
)
def test_each_prompt_gets_its_continuation(model_input: Any, package: Package) -> None:
    params = {"max_new_tokens": 6, "temperature": 0.5, "seed": 3}
    model = package.load_model()
    expected = [
        generate_text(model, package.tokenizer, prompt, SamplingParams(max_new_tokens=6, temperature=0.5, seed=3))
        for prompt in ("to be", "or not")
    ]
    assert _load_pyfunc(str(package.path)).predict(model_input, params) == expected


def test_one_prompt_and_default_parameters_work(package: Package) -> None:
    loaded = _load_pyfunc(str(package.path))
    assert len(loaded.predict("to be", {"seed": None, "max_new_tokens": 2})) == 1
    assert len(loaded.predict({"prompt": "to be"}, {"max_new_tokens": 2})) == 1
    assert loaded.predict([], None) == []


def test_mistakes_are_named(package: Package) -> None:
    loaded = _load_pyfunc(str(package.path))
    with pytest.raises(ConfigError, match="Did you mean 'temperature'"):
        loaded.predict(["x"], {"temprature": 1.0})
    with pytest.raises(ConfigError, match=r"top_p is 2\.0"):
        loaded.predict(["x"], {"top_p": 2.0})
    with pytest.raises(ConfigError, match="the input has 'text'; expected a column \"prompt\""):
        loaded.predict(pd.DataFrame({"text": ["x"]}))


def test_a_dict_of_several_prompts_gives_several_continuations() -> None:
    """MLflow turns {"prompt": ["a", "b"]} into one row that holds a list."""
    import pandas

    from gptcore.pyfunc import prompts_of

    assert prompts_of(pandas.DataFrame([{"prompt": ["a", "b"]}])) == ["a", "b"]
    assert prompts_of({"prompt": ["a", "b"]}) == ["a", "b"]
    assert prompts_of([{"prompt": "a"}, "b"]) == ["a", "b"]
