"""The sampling parameters: type, default, bounds and help of each, defined once.

The engine takes `SamplingParams`. `SAMPLING` describes its fields, and everything that offers them to users is built
from it: the request bodies of the service, the flags of `gptcore.generate` and of the chat, and the signature of a
model registered in MLflow. Nothing here imports torch, so a client of the service stays light.
"""

import math
import typing
from dataclasses import dataclass, field, fields
from typing import Any

from gptcore.errors import ConfigError

MOST_LOGPROBS = 20


def _parameter(
    default: Any, help: str, least: float | None = None, above: float | None = None, most: float | None = None
) -> Any:
    """A field with its help and its bounds; for a list, the bounds apply to each entry. `above` is exclusive."""
    return field(default=default, metadata={"help": help, "least": least, "above": above, "most": most})


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to stop. Raises ConfigError, naming the field, for a value out of range.

    They apply in the order of Hugging Face's transformers: penalties change the logits, `temperature` divides them,
    then `top_k`, `top_p` and `min_p` rule tokens out. (vLLM applies min_p before top_k and top_p.)

    Tokens are ranked by their logits after the penalties; of equal logits, the smaller id ranks first. Neither a
    temperature so high that all weights are alike nor rounding changes the ranking, so top_k = 1 always gives the same
    token as temperature 0.
    """

    max_new_tokens: int = _parameter(
        128, "Most tokens to generate; fewer if the context fills up. The service may set a lower limit.", least=1
    )
    temperature: float = _parameter(
        1.0,
        "Divides the logits: 0 always takes the likeliest token, below 1 is safer, above 1 is more varied.",
        least=0,
    )
    top_k: int = _parameter(0, "Sample from the k likeliest tokens only; 0: from all.", least=0)
    """Never keeps more than k, even if others are as likely."""
    top_p: float = _parameter(
        1.0, "Sample from the fewest likeliest tokens whose probabilities add up to p; 1: from all.", above=0, most=1
    )
    """Nucleus sampling (Holtzman et al. 2020), applied to what top_k left."""
    seed: int | None = _parameter(None, "The same seed, prompt and parameters give the same text; none: a random seed.")
    min_p: float = _parameter(
        0.0, "Leave out tokens less likely than this fraction of the likeliest; 0: none.", least=0, most=1
    )
    """Nguyen et al. 2024."""
    repetition_penalty: float = _parameter(
        1.0, "Above 1, tokens of the prompt and the text so far become less likely; 1: off.", above=0
    )
    """Divides their logits where positive and multiplies them elsewhere (Keskar et al. 2019)."""
    presence_penalty: float = _parameter(
        0.0, "Subtracted from the logit of each token generated so far; 0: off.", least=-2, most=2
    )
    """As in OpenAI's API, like the next one."""
    frequency_penalty: float = _parameter(
        0.0, "Subtracted from a token's logit once per time it was generated; 0: off.", least=-2, most=2
    )
    stop: tuple[str, ...] = _parameter((), "The text ends before the first of these strings.")
    stop_token_ids: tuple[int, ...] = _parameter((), "The text ends before any of these tokens.", least=0)
    ignore_eos: bool = _parameter(False, "Continue after the end-of-text token, until the length is reached.")
    logprobs: int | None = _parameter(
        None, "Report each token's log-probability and those of the k likeliest.", least=0, most=MOST_LOGPROBS
    )

    def __post_init__(self) -> None:
        for name, parameter in SAMPLING.items():
            value = getattr(self, name)
            if not parameter.accepts(value):
                raise ConfigError(f"{name} is {value!r}; expected {parameter.expected}", param=name)
        for name in ("stop", "stop_token_ids"):  # callers may pass lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalises(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def filters(self) -> bool:
        """Whether some tokens are ruled out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class Parameter:
    """One field of SamplingParams. `type` is int, float, bool or str: of the entries, where there are `several`."""

    name: str
    type: type
    several: bool
    default: Any
    help: str
    least: float | None
    above: float | None
    most: float | None

    def accepts(self, value: Any) -> bool:
        """Whether `value` is within the bounds. Types are the caller's to check; NaN and infinity do not fit."""
        if self.several:
            return not isinstance(value, str) and all(map(self._fits, value))
        return (value is None and self.default is None) or self._fits(value)

    def _fits(self, value: Any) -> bool:
        if self.type is str:
            return bool(value)
        above_least = self.least is None or value >= self.least
        return above_least and (self.above is None or value > self.above) and self._below_most(value)

    def _below_most(self, value: Any) -> bool:
        return value <= self.most if self.most is not None else self.type is int or value < math.inf

    @property
    def expected(self) -> str:
        """The accepted values, for error messages."""
        if self.type is str:
            return "a list of strings that are not empty"
        if self.least is not None and self.most is not None:
            text = f"{self.least:g} to {self.most:g}"
        else:
            low = f"more than {self.above:g}" if self.above is not None else f"at least {self.least:g}"
            text = low if self.most is None else f"{low} and at most {self.most:g}"
        return f"token ids of {text}" if self.several else f"none, or {text}" if self.default is None else text


def _describe() -> dict[str, Parameter]:
    hints, found = typing.get_type_hints(SamplingParams), {}
    for f in fields(SamplingParams):
        hint = hints[f.name]
        parts = [part for part in typing.get_args(hint) if part not in (type(None), ...)]
        several = typing.get_origin(hint) is tuple
        found[f.name] = Parameter(f.name, parts[0] if parts else hint, several, f.default, **f.metadata)
    return found


SAMPLING = _describe()
"""Every field of SamplingParams, by name."""
