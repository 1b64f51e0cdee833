"""How a setting is declared, checked and read: one `setting(...)` line holds everything known about it.

In: a dataclass field made by `setting`, and a value from a flag or a YAML file. Out: the value in the field's type, or
a ConfigError that says what was expected.
"""

import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import Field, dataclass, field
from typing import Any

from gptcore.errors import ConfigError, did_you_mean, excerpt


@dataclass(frozen=True)
class Bounds:
    """Which numbers a setting accepts, and how a message describes them."""

    accepts: Callable[[Any], bool]
    expected: str


POSITIVE = Bounds(lambda x: 0 < x < math.inf, "more than 0, and finite")
NOT_NEGATIVE = Bounds(lambda x: x >= 0, "0 or more")
SHARE = Bounds(lambda x: 0 <= x <= 1, "between 0 and 1")
DECAY = Bounds(lambda x: 0 <= x < 1, "between 0 and less than 1")
SEED = Bounds(lambda x: 0 <= x < 2**63, "between 0 and 2**63 - 1")
RETRIES = Bounds(lambda x: x >= -1, "-1 (no limit), 0 or more")


def setting(
    default: Any,
    help: str,
    unit: str = "",
    bounds: Bounds | None = None,
    choices: tuple[str, ...] = (),
    resumable: bool = False,
    added: bool = False,
) -> Any:
    """A dataclass field with its documentation, its bounds, and whether a resumed run may change it.

    `added`: earlier versions did not have it, so the settings of their runs lack it.
    """
    said = {"help": help, "unit": unit, "bounds": bounds, "choices": choices, "resumable": resumable, "added": added}
    return field(default=default, metadata=said)


def check(f: Field[Any], value: Any) -> None:
    """Raises ConfigError if `value` is outside the field's bounds or not one of its choices."""
    bounds, choices = f.metadata.get("bounds"), f.metadata.get("choices")
    if bounds and value is not None and not bounds.accepts(value):
        raise ConfigError(f"{f.name} is {value}; expected {bounds.expected}")
    if choices and value not in choices:
        raise ConfigError(f"{f.name} is {value!r}; expected {', '.join(choices)}.{did_you_mean(str(value), choices)}")


def check_mlflow_name(name: str, value: str, refused: str = "") -> None:
    """Raises ConfigError for a name that MLflow would refuse at the end of the run; `refused` are characters."""
    if not value.strip() or not value.isprintable() or len(value) > 250 or set(value) & set(refused):
        without = f", without {' and '.join(refused)}" if refused else ""
        raise ConfigError(f"{name} is {excerpt(value)}; expected a name of at most 250 characters{without}")


def bare(hint: Any) -> tuple[Any, bool]:
    """A field's type without `| None`, and whether None is allowed."""
    if not isinstance(hint, types.UnionType):
        return hint, False
    return next(o for o in typing.get_args(hint) if o is not types.NoneType), True


def convert(f: Field[Any], hint: Any, value: Any) -> Any:
    """Converts `value` (a flag's string, or what YAML parsed) to the field's type. Raises ConfigError if it cannot."""
    wanted, optional = bare(hint)
    if value is None and optional:
        return None
    if typing.get_origin(wanted) is tuple:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or any(isinstance(text, (list, dict, type(None))) for text in texts):
            raise ConfigError(f"{f.name} is {value!r}; expected a list of texts")
        return tuple(_text(f.name, str(text)) for text in texts)
    if optional and str(value).lower() == "none":
        return None
    try:
        if wanted is str and isinstance(value, str):
            if not value:
                raise ConfigError(f"{f.name} is empty; give it a value, or leave it out")
            return _text(f.name, value)
        if wanted is int and isinstance(value, (int, str)) and re.fullmatch(r"[-+]?\d{1,300}", str(value)):
            return int(value)  # a float would round the last digits of a large number
        if wanted is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if wanted is int and (isinstance(value, bool) or float(value) != int(float(value))):
            raise ValueError
        if isinstance(value, (list, dict)) or (wanted is float and isinstance(value, bool)):
            raise ValueError
        return int(float(value)) if wanted is int else wanted(value)
    except (KeyError, ValueError, TypeError, OverflowError):
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[wanted]
        unit = f" ({f.metadata['unit']})" if f.metadata["unit"] else ""
        raise ConfigError(f"{f.name} is {value!r}; expected {kind}{unit}") from None


def _text(name: str, value: str) -> str:
    """The value, if a file and MLflow can store it as text. Raises ConfigError if not."""
    if "\0" in value:
        raise ConfigError(f"{name} is {value!r}; expected text without the character NUL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} is {value!r}; expected text in UTF-8") from None
    return value
