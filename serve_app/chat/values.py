"""Sampling parameters as text: parsing what the user types, and showing values.

Names, bounds and help come from `serve_app.http.parameters`, so commands and flags always match the service. Only
values that were set are sent; the service applies its own defaults to the rest.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from gptcore.errors import ConfigError, did_you_mean
from serve_app.http.parameters import Parameters

HUGE = 2**31 - 1
"""Bounds from here on are not shown."""
BOOLEANS = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}
NOTHING = ("none", "null", "default")
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
KINDS = {"integer": "a whole number", "number": "a number", "boolean": "on or off", "array": "whole numbers"}


def _shape(schema: dict[str, Any]) -> dict[str, Any]:
    """A property's JSON schema without the null for "not given"."""
    return {**schema, **schema["anyOf"][0]} if "anyOf" in schema else schema


_PROPERTIES: dict[str, dict[str, Any]] = Parameters.model_json_schema()["properties"]
SHAPES = {name: _shape(_PROPERTIES[name]) for name in ("max_new_tokens", *_PROPERTIES)}
"""JSON schema of each parameter, by name; the length first."""


class Values:
    """The parameters of a chat: the values that were set, and defaults for the rest."""

    def __init__(self) -> None:
        self._set: dict[str, Any] = {}
        self.replies = False
        """The model answers conversations. Then its answers have no default length."""

    def set(self, name: str, text: str) -> None:
        """Set a value from text; `default` resets it. Raises ConfigError."""
        name = parameter(name)
        if text.strip().lower() in NOTHING:
            self._set.pop(name, None)
        else:
            self._set[name] = read(name, text)

    def reset(self) -> None:
        """Reset all parameters."""
        self._set.clear()

    def body(self) -> dict[str, Any]:
        """The fields for a request's body."""
        body = dict(self._set)
        if self.replies and "max_new_tokens" in body:
            body["max_completion_tokens"] = body.pop("max_new_tokens")
        return body

    def value(self, name: str) -> Any:
        """The current value."""
        return self._set.get(name, self._default(name))

    def is_set(self, name: str) -> bool:
        """Whether a value was set."""
        return name in self._set

    def row(self, name: str) -> str:
        """One parameter as a sentence."""
        return f"{name} is {self._stated(name)}. {about(name)}"

    def table(self) -> list[tuple[str, str, str]]:
        """(name, value and default, help) of each parameter."""
        return [(name, self._stated(name), about(name)) for name in SHAPES]

    def _default(self, name: str) -> Any:
        return None if self.replies and name == "max_new_tokens" else default(name)

    def _stated(self, name: str) -> str:
        usual = f" (default {written(self._default(name))})" if self.is_set(name) else ""
        return written(self.value(name)) + usual


def parameter(name: str) -> str:
    """The parameter called `name`, with hyphens or underscores. Raises ConfigError."""
    known = name.strip().replace("-", "_").lower()
    if known not in SHAPES:
        raise ConfigError(f"there is no setting {name!r}.{did_you_mean(known, SHAPES) or ' /settings lists them.'}")
    return known


def default(name: str) -> Any:
    """The parameter's default."""
    return SHAPES[name]["default"]


def about(name: str) -> str:
    """The parameter's help."""
    return SHAPES[name].get("description", "")


def read(name: str, text: str) -> Any:
    """Parse `text`. Raises ConfigError with what was expected."""
    try:
        value = _value(SHAPES[name], text)
        return getattr(Parameters.model_validate({name: value}), name)
    except (ValueError, ValidationError):
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise ConfigError(f"{name} is {shown!r}; expected {expected(name)}", param=name) from None


def read_all(name: str, texts: Sequence[str]) -> str:
    """Join the values of a repeated flag into one text; stop strings keep their spaces."""
    if len(texts) == 1:
        return texts[0]
    if _is_text(SHAPES[name]):
        return json.dumps([_unescaped(text) for text in texts])
    return " ".join(texts) if SHAPES[name]["type"] == "array" else texts[-1]


def written(value: Any) -> str:
    """A value in the form that can be typed."""
    match value:
        case None | []:
            return "none"
        case bool():
            return "on" if value else "off"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case list() if all(isinstance(part, int) for part in value):
            return " ".join(map(str, value))
        case list():
            return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)


def expected(name: str) -> str:
    """A description of the accepted values."""
    shape = SHAPES[name]
    if _is_text(shape):
        longest = shape["oneOf"][0]["maxLength"]
        return f'text of at most {longest} characters, or several as ["one", "two"]'
    kind, inner = KINDS[shape["type"]], shape.get("items", shape)
    least, above, most = (inner.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    if most is not None and most >= HUGE:
        if least < -HUGE:
            return f"{kind} of at most {int(most).bit_length() + 1} bits"
        most = None
    if above is not None:
        return f"{kind} above {above}" + ("" if most is None else f" and at most {most}")
    if least is None or most is None:
        return kind if least is None else f"{kind} of at least {least}"
    return f"{kind} from {least} to {most}"


def _is_text(shape: dict[str, Any]) -> bool:
    return "oneOf" in shape


def _value(shape: dict[str, Any], text: str) -> Any:
    if _is_text(shape):
        return _texts(text)
    match shape["type"]:
        case "integer":
            return int(text)
        case "number":
            return float(text)
        case "boolean":
            if text.strip().lower() not in BOOLEANS:
                raise ValueError
            return BOOLEANS[text.strip().lower()]
    return [int(part) for part in re.split(r"[\s,]+", text.strip("[] \t")) if part]


def _texts(text: str) -> str | list[str]:
    """One text, in which \\n is a line break, or a JSON string, or a JSON list of strings."""
    if text.startswith(("[", '"')):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass  # a plain text that starts like JSON
    return _unescaped(text)


def _unescaped(text: str) -> str:
    return re.sub(r"\\([ntr\\])", lambda escape: ESCAPES[escape[1]], text)
