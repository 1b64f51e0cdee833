"""MLflow's python_function flavor for packages: MLflow calls `_load_pyfunc`, then `predict`.

`predict` returns one continuation per prompt. MLflow imports this module by name from the logged model's code, so
nothing is pickled and the module must not move; it does not need MLflow itself.
"""

from typing import Any

from gptcore.errors import ConfigError, did_you_mean
from gptcore.package import Package, open_package
from gptcore.parameters import SAMPLING, SamplingParams
from gptcore.sampling import generate_text


class TextModel:
    """A loaded package with the `predict` method that MLflow calls."""

    def __init__(self, package: Package) -> None:
        self.package = package
        self.model = package.load_model()

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """A continuation for each prompt. `model_input` is a DataFrame or dict with "prompt", a list, or one prompt.

        `params` are fields of SamplingParams. Raises ConfigError for other names, or if there are no prompts.
        """
        for name in params or {}:
            if name not in SAMPLING:
                known = ", ".join(SAMPLING)
                raise ConfigError(f"there is no parameter {name!r}; there are {known}.{did_you_mean(name, SAMPLING)}")
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
    for item in model_input:  # MLflow puts {"prompt": [...]} into one cell, so lists may be nested
        prompts += prompts_of(item) if isinstance(item, str | dict) or hasattr(item, "__iter__") else [str(item)]
    return prompts


def _load_pyfunc(data_path: str) -> TextModel:
    """MLflow's entry point: `data_path` is the package's folder inside the logged model."""
    return TextModel(open_package(data_path))
