"""How MLflow serves a package: its generic python_function calls `_load_pyfunc`, then `predict`.

In: prompts, as MLflow hands them over, and sampling parameters. Out: one continuation per prompt. MLflow loads this
module by name from the logged model's code, so nothing is pickled; the module itself does not need MLflow.
"""

import typing
from dataclasses import dataclass, fields
from typing import Any

from gptcore.errors import ConfigError, did_you_mean
from gptcore.package import Package, open_package
from gptcore.sampling import SamplingParams, generate_text


@dataclass(frozen=True)
class Param:
    """A sampling parameter as a model's signature tells it: int, float, bool or str, one or several."""

    name: str
    type: type
    several: bool
    default: Any


def _params() -> dict[str, Param]:
    """The parameters of SamplingParams, whatever it has."""
    hints, found = typing.get_type_hints(SamplingParams), {}
    for field in fields(SamplingParams):
        parts = [part for part in typing.get_args(hints[field.name]) if part not in (type(None), ...)]
        several = typing.get_origin(hints[field.name]) is tuple
        found[field.name] = Param(field.name, parts[0] if parts else hints[field.name], several, field.default)
    return found


PARAMS = _params()


class TextModel:
    """A loaded package with the one method that MLflow calls."""

    def __init__(self, package: Package) -> None:
        self.package = package
        self.model = package.load_model()

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """A continuation for each prompt. `model_input` is a DataFrame or dict with "prompt", a list, or one prompt.

        `params` are those of SamplingParams. Raises ConfigError for others, or if there are no prompts.
        """
        for name in params or {}:
            if name not in PARAMS:
                raise ConfigError(f"{name!r} is none of {', '.join(PARAMS)}.{did_you_mean(name, PARAMS)}")
        sampling = SamplingParams(**{name: value for name, value in (params or {}).items() if value is not None})
        return [generate_text(self.model, self.package.tokenizer, p, sampling) for p in prompts_of(model_input)]


def prompts_of(model_input: Any) -> list[str]:
    """The prompts in a DataFrame with a "prompt" column, a dict with that key, a list of prompts or dicts, or one."""
    if isinstance(model_input, str):
        return [model_input]
    if hasattr(model_input, "columns") or isinstance(model_input, dict):
        if "prompt" not in model_input:
            raise ConfigError(f'the input has {", ".join(map(repr, model_input))}; expected a column "prompt"')
        return prompts_of(model_input["prompt"])
    prompts: list[str] = []
    for item in model_input:  # MLflow makes one cell of {"prompt": [...]}, so lists nest
        prompts += prompts_of(item) if isinstance(item, str | dict) or hasattr(item, "__iter__") else [str(item)]
    return prompts


def _load_pyfunc(data_path: str) -> TextModel:
    """MLflow's entry point: `data_path` is the package's folder inside the logged model."""
    return TextModel(open_package(data_path))
