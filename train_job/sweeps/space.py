"""A sweep's config: the settings that all trials share, and the search space of the others.

In: a YAML file and flags. Out: a `SweepConfig`, and the values of each trial. A value is a function of (draw_seed, the
draw's number, the setting's name), so adding trials later does not change the earlier ones.
"""

import itertools
import math
import random
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from gptcore.config import setting
from gptcore.errors import ConfigError, did_you_mean
from train_job.config import LIMITS, RESUMABLE, build_config, setting_type, setting_value
from train_job.fields import convert

RANGES = ("uniform", "log_uniform")
TEXT = frozenset({"data", "val_data", "val_fraction", "text_column", "document_separator"})
"""All trials read the same text and are evaluated on the same bytes."""
FIXED = RESUMABLE - LIMITS | TEXT | {"init_from"}
"""Settings that all trials share: text, parent, and those that do not affect what a step computes."""
DRAWS_PER_TRIAL = 100
MOST_CORNERS = 1024
DIGITS = 4
"""Significant digits of drawn numbers, so that tables show exactly what was tried."""


@dataclass(frozen=True)
class SweepConfig:
    """A sweep's settings. Raises ConfigError for an invalid value."""

    search: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "What is tried: by setting, a list of values, {uniform: [low, high]} or "
            "{log_uniform: [low, high]}; the ends belong to a range; a whole number stays one."
        },
    )
    base: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "What all trials share: settings as in a --config file of run.py."}
    )
    trials: int = setting(8, "How many trials, each with values drawn at random; a grid has as many as it has.")
    grid: bool = setting(False, "Try every combination of the lists under search instead of drawing.")
    draw_seed: int = setting(1337, "Decides which values are drawn; `seed` is the trials' own.")
    concurrency: int | None = setting(None, "Trials at a time; default: as many as the cluster has room for.")
    asha: bool = setting(True, "Stop trials early that are behind at the same step (ASHA).")
    grace_steps: int | None = setting(None, "Steps that every trial gets; default: until the first evaluation.")
    reduction: float = setting(3.0, "ASHA lets the best 1/N go on, at grace_steps, N times that, N² times that…")
    keep: int = setting(3, "Trials whose package and checkpoints are kept: the best so many.")

    def __post_init__(self) -> None:
        for name in ("trials", "concurrency", "grace_steps", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1")
        if not 1 < self.reduction < math.inf:
            raise ConfigError(f"reduction is {self.reduction}; expected more than 1")
        if not self.search:
            raise ConfigError("search names no setting; expected lines such as `learning_rate: {log_uniform: [a, b]}`")

    def values(self) -> list[dict[str, Any]]:
        """The values of each trial. Raises ConfigError if there are fewer different ones than `trials`."""
        axes = {name: _axis(name, space) for name, space in self.search.items()}
        if self.grid:
            if ranges := [name for name, axis in axes.items() if isinstance(axis, _Range)]:
                raise ConfigError(f"grid is on, but search.{ranges[0]} is a range; expected a list of values")
            lists = [axis for axis in axes.values() if isinstance(axis, tuple)]
            return [dict(zip(axes, combination, strict=True)) for combination in itertools.product(*lists)]
        drawn: list[dict[str, Any]] = []
        for number in range(self.trials * DRAWS_PER_TRIAL):
            values = {name: _drawn(axis, f"{self.draw_seed} {number} {name}") for name, axis in axes.items()}
            if values not in drawn:
                drawn.append(values)
            if len(drawn) == self.trials:
                return drawn
        raise ConfigError(
            f"trials is {self.trials}, but search gives only {len(drawn)} that differ; lower it, or use grid"
        )

    def corners(self) -> Iterator[dict[str, Any]]:
        """Every combination of range ends and list members, up to MOST_CORNERS."""
        axes = {name: _axis(name, space) for name, space in self.search.items()}
        ends = [axis.ends if isinstance(axis, _Range) else axis for axis in axes.values()]
        for combination in itertools.islice(itertools.product(*ends), MOST_CORNERS):
            yield dict(zip(axes, combination, strict=True))


FIELDS = {f.name: f for f in fields(SweepConfig)}
HINTS = typing.get_type_hints(SweepConfig)
FLAGS = tuple(name for name in FIELDS if HINTS[name] != dict[str, Any])
"""Settings that are also flags."""


def build_sweep(given: Mapping[str, Any]) -> SweepConfig:
    """Builds a sweep from YAML values and checks every trial's config. Raises ConfigError, naming the key."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in FIELDS:
            nearest = did_you_mean(str(key), FIELDS)
            raise ConfigError(f"a sweep has no {key!r}; settings of all trials stand under base.{nearest}")
        if key in FLAGS:
            values[key] = convert(FIELDS[key], HINTS[key], value)
        elif isinstance(value, dict):
            values[key] = value
        else:
            raise ConfigError(f"{key} is {value!r}; expected settings below it, one a line")
    sweep = SweepConfig(**values)
    for name in sweep.base:
        setting_type(name)
        if name == "resume":
            raise ConfigError("resume stands under base; a sweep goes on with --resume NAME on the command line")
        if name in sweep.search:
            raise ConfigError(f"{name} stands under base and under search; expected one of them")
    texts = {}
    for chosen in itertools.chain(sweep.corners(), sweep.values()):
        try:
            config = build_config(sweep.base, chosen)
        except ConfigError as error:
            raise ConfigError(f"search allows {shown(chosen)}, which is not valid: {error}") from None
        texts[tuple(getattr(config, name) for name in TEXT)] = config.data
    if len(texts) > 1:
        data = ", ".join(texts.values())
        raise ConfigError(f"the trials would read different texts ({data}); expected `data: …` under base")
    return sweep


def shown(values: Mapping[str, Any]) -> str:
    """Such as `learning_rate=0.004 num_layers=3`."""
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def described(search: Mapping[str, Any]) -> str:
    """The search in words: `learning_rate 0.001 to 0.01 (log_uniform), num_layers of 2, 4`."""
    parts = []
    for name, space in search.items():
        axis = _axis(name, space)
        if isinstance(axis, _Range):
            parts.append(f"{name} {axis.low:g} to {axis.high:g} ({axis.kind})")
        else:
            parts.append(f"{name} of {', '.join(map(str, axis))}")
    return ", ".join(parts)


@dataclass(frozen=True)
class _Range:
    kind: str
    low: float
    high: float
    whole: bool

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high


def _axis(name: str, space: Any) -> _Range | tuple[Any, ...]:
    """The range or list of one setting under `search`. Raises ConfigError if it is not valid."""
    wanted = setting_type(name)
    if name in FIXED:
        raise ConfigError(f"{name} cannot be searched: it is the same for all trials; give it under base")
    if isinstance(space, list) and space:
        values = [setting_value(name, value) for value in space]
        return tuple(value for i, value in enumerate(values) if value not in values[:i])
    if not isinstance(space, dict) or len(space) != 1:
        expected = "a list of values, {uniform: [low, high]} or {log_uniform: [low, high]}"
        raise ConfigError(f"search.{name} is {space!r}; expected {expected}")
    [(kind, bounds)] = space.items()
    if kind not in RANGES:
        raise ConfigError(
            f"search.{name} is {kind!r}; expected {' or '.join(RANGES)}.{did_you_mean(str(kind), RANGES)}"
        )
    if wanted not in (int, float):
        raise ConfigError(f"search.{name} is a range, but {name} is not a number; expected a list of values")
    if not isinstance(bounds, list) or len(bounds) != 2:
        raise ConfigError(f"search.{name}.{kind} is {bounds!r}; expected [low, high]")
    low, high = (setting_value(name, bound) for bound in bounds)
    if low is None or high is None or not low < high:
        raise ConfigError(f"search.{name}.{kind} is {bounds}; expected the lower end first")
    if kind == "log_uniform" and low <= 0:
        raise ConfigError(f"search.{name}.log_uniform begins at {low}; expected more than 0")
    return _Range(kind, low, high, wanted is int)


def _drawn(axis: _Range | tuple[Any, ...], key: str) -> Any:
    """The value that `key` determines, the same on any machine."""
    u = random.Random(key).random()
    if not isinstance(axis, _Range):
        return axis[int(u * len(axis))]
    low, high = axis.low, axis.high + 1 if axis.whole else axis.high
    x = low * (high / low) ** u if axis.kind == "log_uniform" else low + (high - low) * u
    return min(int(x), axis.high) if axis.whole else min(max(float(f"{x:.{DIGITS}g}"), low), high)
