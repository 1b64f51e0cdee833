"""The sandbox in which chat templates run: Jinja's, as `transformers` sets it up, with bounded steps and texts.

A template comes with a model that somebody else may have published.
"""

import json
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

MOST_STEPS = 1_000_000
"""Iterations and calls of one rendering, about a second; 10,000 messages take a tenth of it."""
MOST_CHARACTERS = 1 << 20
"""A rendered text has at most so many more characters than twice its messages."""
FIXED_DAY = datetime(2026, 1, 1)
"""The date in training: the tokens of a conversation must be the same on every machine and day."""
today: ContextVar[datetime | None] = ContextVar("today", default=None)
left_over: ContextVar[list[int]] = ContextVar("left_over")
"""Steps and characters left to the rendering that is going on."""


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment that `transformers` gives templates, with every iteration, call and text counted."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        extensions = [_Generation, jinja2.ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.filters |= {"tojson": _to_json, "replace": _replace, "counted": _iterated, "bounded": _bounded}
        for name in ("batch", "center", "format", "indent", "slice"):
            del self.filters[name]  # with a large number they fill the memory, and chats do without
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now}

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        _step()
        for argument in (*args, *kwargs.values()):
            _bounded(range(argument) if isinstance(argument, int) else argument)  # as in "x".ljust(10**9)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str) and function.__name__ == "replace":
            return _replace(owner, *args)
        return _bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise jinja2.TemplateError(f"{operator} is not supported")
        for text, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(text, (str, list, tuple)) and isinstance(times, int):
                _bounded(range(len(text) * times))
        return _bounded(super().call_binop(context, operator, left, right))


class _Generation(jinja2.ext.Extension):
    """The tag `generation`, with which some templates mark an answer; it changes nothing here."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


MISTAKES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError)
"""What Python raises for a template's mistake, as Jinja does not wrap it."""


def watched(tree: nodes.Template) -> nodes.Template:
    """The template with counters in its loops, and limits on the texts that it puts together."""

    def limited(node: Any) -> Any:
        return _filtered(node, "bounded", node.lineno) if isinstance(node, nodes.Concat) else node

    for node in [*tree.find_all(nodes.Node)]:
        for name, value in [*node.iter_fields()]:
            setattr(node, name, [*map(limited, value)] if isinstance(value, list) else limited(value))
        if isinstance(node, nodes.For):
            if node.recursive:
                raise jinja2.TemplateSyntaxError("recursive loops are not supported", node.lineno)
            node.iter = _filtered(node.iter, "counted", node.lineno)
        if isinstance(node, nodes.AssignBlock):
            node.filter = _filtered(node.filter, "bounded", node.lineno)
    return tree


def _filtered(node: nodes.Node | None, name: str, line: int) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=line)


def _step() -> None:
    left = left_over.get()
    left[0] -= 1
    if left[0] < 0:
        raise jinja2.TemplateError(f"it takes more than {MOST_STEPS:,} steps")


def _iterated(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _step()
        yield item


def counted(piece: str) -> str:
    """A piece of the text."""
    left = left_over.get()
    left[1] -= len(piece)
    if left[1] < 0:
        raise jinja2.TemplateError("its text is too long")
    return piece


def _bounded(value: Any) -> Any:
    """A value that a template has made."""
    most = left_over.get()[1]
    if isinstance(value, (str, list, tuple, range)) and len(value) > most:
        raise jinja2.TemplateError("it makes a text or list that is too long")
    if isinstance(value, int) and value.bit_length() > 1024:
        raise jinja2.TemplateError("it computes a number of more than 1,024 bits")
    return value


def _replace(text: Any, old: Any, new: Any, count: int = -1) -> str:
    text, old, new = str(text), str(old), str(new)
    found = text.count(old) if count < 0 else min(count, text.count(old))
    _bounded(range(len(text) + max(0, found * (len(new) - len(old)))))
    return text.replace(old, new, count)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, **more: Any
) -> str:
    """As in `transformers`: JSON for a model, not for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **more)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return (today.get() or datetime.now()).strftime(form)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
