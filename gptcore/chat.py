"""Chats as text: a model's chat template, and the tokens of a conversation.

In: messages in OpenAI's form, and the template of the model's package, in Jinja as `transformers` has it. Out: the text
that the template makes of them, and its ids, which are those of `apply_chat_template` with one exception: what was
typed into a message never becomes a special token, whatever it spells.

A template comes with a model that somebody else may have published. It runs in Jinja's sandbox, and its steps and its
text are bounded.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from gptcore.errors import ConfigError, PackageError
from gptcore.hf_tokenizer import CONFIG
from gptcore.tokenizer import CHAT, Tokenizer, with_chat_tokens

Message = Mapping[str, Any]
"""`role` and `content`, and whatever else a template knows."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The template of models that have no other: OpenAI's ChatML."""
MOST_STEPS = 1_000_000
"""Iterations and calls of one rendering, about a second; 10,000 messages take a tenth of it."""
MOST_CHARACTERS = 1 << 20
"""A rendered text has at most so many more characters than twice its messages."""
GUARDS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Unicode's noncharacters, which no text should contain."""
CUT = "\U0001fffe "
"""Another noncharacter, which ends a message that goes on; the space shows whether the template trims."""
_steps: ContextVar[list[int]] = ContextVar("steps")
"""Steps and characters left to the rendering that is going on."""


class ChatTemplate:
    """A compiled template with the names of a tokenizer's special tokens.

    Raises PackageError for a template that is not valid Jinja.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.source, self.tokenizer = source, tokenizer
        try:
            sandbox = _Sandbox()
            self._template = sandbox.from_string(_watched(sandbox.parse(source)))
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            raise PackageError(f"the chat template cannot be compiled: {_one_line(error)}") from error

    def render(
        self,
        messages: Sequence[Message],
        generate: bool = True,
        continues: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation.

        It ends with the beginning of an answer, if the template is told to `generate` one, or with the last message if
        that `continues`. Raises ConfigError if the template refuses the messages, fails, or takes too long.
        """
        if continues:
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + CUT}]
        size = sum(map(_characters, messages))
        token = _steps.set([MOST_STEPS, MOST_CHARACTERS + 2 * size])
        given = {"tools": None, "documents": None} | self.tokenizer.special_names | dict(variables or {})
        try:
            pieces = self._template.generate(given | {"messages": messages, "add_generation_prompt": generate})
            text = "".join(map(_counted, pieces))
        except (jinja2.TemplateError, *_MISTAKES) as error:
            why = f"the model's chat template refuses the messages: {_one_line(error)}"
            raise ConfigError(why, "messages") from error
        finally:
            _steps.reset(token)
        if not continues:
            return text
        before, mark, behind = text.rpartition(CUT.strip())
        if not mark:
            raise ConfigError("the model's chat template leaves out the last message, so it cannot go on", "messages")
        return before if behind.startswith(CUT[-1]) else before.rstrip()  # a template that trims it trims more

    def encode(
        self,
        messages: Sequence[Message],
        generate: bool = True,
        continues: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of `render`'s text. Special tokens that are spelled in a message are text. Raises ConfigError."""
        guard, free = _unused(messages, 2)
        text = self.render(
            [_guard(message, self._spelled, guard) for message in messages], generate, continues, variables
        )
        return [number for number, _ in self.tokenizer.encode_special(text, guard, free)]

    def answers(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The ids of a whole conversation, and for each whether the assistant has to write it.

        That is what a model is trained on: from where the template begins an answer to the token that ends its turn.
        Raises ConfigError as `encode` does, and for a template that does not end an answer with a special token.
        """
        guard, free, opens, closes = _unused(messages, 4)
        guarded = [_guard(message, self._spelled, guard) for message in messages]
        text = self._marked(guarded, opens, closes)
        (beginning, lead), spans, behind = self._beginning, [], 0
        for found in re.finditer(f"{opens}.*?{closes}", text, re.DOTALL):
            begun = text.rfind(beginning, behind, found.start()) if beginning else -1
            lead_fits = text.endswith(lead, behind, found.start())
            start = begun + len(beginning) if begun >= 0 else found.start() - len(lead) * lead_fits
            behind = self._end_of_turn(text, found.end())
            spans.append((start, behind))
        ids, ours, number = [], [], 0
        for token, place in self.tokenizer.encode_special(text, guard + opens + closes, free):
            while number < len(spans) and place >= spans[number][1]:
                number += 1
            ids.append(token)
            ours.append(number < len(spans) and place >= spans[number][0])
        return ids, ours

    @cached_property
    def end_of_turn(self) -> int:
        """The token that ends an answer. Raises ConfigError if it is none of the special ones."""
        ids, ours = self.answers([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        return [token for token, answered in zip(ids, ours, strict=True) if answered][-1]

    def _end_of_turn(self, text: str, end: int) -> int:
        """Where the special token ends that follows an answer, perhaps behind white space. Raises ConfigError."""
        found = self._spelled.search(text, end)
        if not found or text[end : found.start()].strip():
            raise ConfigError("the model's chat template does not end an answer with a special token", "chat_template")
        return found.end()

    def _marked(self, messages: Sequence[Message], opens: str, closes: str) -> str:
        """The text with `opens` and `closes` around each answer, as the template has it: perhaps trimmed.

        Raises ConfigError.
        """
        plain = self.render(messages, generate=False)
        for trim in (str, str.strip):
            marked = self.render(
                [
                    {**m, "content": f"{opens}{trim(m['content'])}{closes}"} if m["role"] == "assistant" else m
                    for m in messages
                ],
                generate=False,
            )
            if marked.replace(opens, "").replace(closes, "") == plain:
                return marked
        raise ConfigError("the model's chat template changes the text of an answer", "messages")

    @cached_property
    def _beginning(self) -> tuple[str, str]:
        """What the template begins an answer with when it is told to, and what is between that and the answer."""
        asked = [{"role": "user", "content": "a"}]
        before, begun = (self.render(asked, generate) for generate in (False, True))
        beginning = begun.removeprefix(before) if begun.startswith(before) else ""
        whole = self.render([*asked, {"role": "assistant", "content": "b"}], generate=False)
        lead = whole[len(begun) :].partition("b")[0] if whole.startswith(begun) else ""
        return beginning, lead

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.tokenizer.special_tokens)))


def chat_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer of a model that answers: with its own chat template, or with ChatML.

    What ends an answer ends a text. Raises PackageError for a template that cannot be trained with, and for an open
    model without one whose vocabulary lacks ChatML's special tokens.
    """
    published = tokenizer.published
    if template_source(tokenizer) is None:
        if published is None:
            return replace(with_chat_tokens(tokenizer), chat_template=CHATML)
        if not {*CHAT} <= {*tokenizer.special_tokens}:
            raise PackageError(
                f"the model has no chat template, and its vocabulary lacks {' and '.join(CHAT)}, with which one could "
                "be made; expected a model with a template, such as Qwen/Qwen3-0.6B or an instruct model"
            )
        tokenizer = replace(tokenizer, encoding=published.with_file("chat_template.jinja", CHATML.encode()))
    template = chat_template(tokenizer)
    if template is None:
        raise PackageError("the model has several chat templates and none of them is called default")
    try:
        ends = template.end_of_turn
    except ConfigError as error:
        raise PackageError(str(error)) from error
    if tokenizer.published and ends not in tokenizer.stops:
        tokenizer = replace(tokenizer, encoding=tokenizer.published.with_stop(ends))
    return tokenizer


def chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The tokenizer's own template, the default one of several. Raises PackageError."""
    source = template_source(tokenizer)
    if isinstance(source, list):
        named = {each.get("name"): each.get("template") for each in source}
        source = named.get("default")
    return None if source is None else ChatTemplate(source, tokenizer)


def template_source(tokenizer: Tokenizer) -> str | list[dict[str, str]] | None:
    """The Jinja template by which a chat is formatted; an open model's files may have several with names."""
    if tokenizer.published is None:
        return tokenizer.chat_template
    files = dict(tokenizer.published.files)
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    beside = json.loads(files.get("chat_template.json", b"{}"))
    return beside.get("chat_template") or tokenizer.published.content(CONFIG).get("chat_template")


# --- what was typed -----------------------------------------------------------------------------------------------


def _unused(messages: Sequence[Message], count: int) -> list[str]:
    """Noncharacters that the messages do not contain. Raises ConfigError for too few."""
    everything = json.dumps([*messages], ensure_ascii=False)
    unused = [guard for guard in GUARDS if guard not in everything]
    if len(unused) < count:
        raise ConfigError("the messages contain nearly all of Unicode's noncharacters U+FDD0 to U+FDEF", "messages")
    return unused[:count]


def _guard(value: Any, spelled: re.Pattern[str], guard: str) -> Any:
    """`value` with `guard` inside whatever spells a special token, so that it spells none."""
    if isinstance(value, str):
        return spelled.sub(lambda found: found[0][:1] + guard + found[0][1:], value)
    if isinstance(value, Mapping):
        return {key: _guard(each, spelled, guard) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_guard(each, spelled, guard) for each in value]
    return value


def _characters(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 1


# --- the sandbox --------------------------------------------------------------------------------------------------


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
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


_MISTAKES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError)
"""What Python raises for a template's mistake, as Jinja does not wrap it."""


def _watched(tree: nodes.Template) -> nodes.Template:
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
    left = _steps.get()
    left[0] -= 1
    if left[0] < 0:
        raise jinja2.TemplateError(f"it takes more than {MOST_STEPS:,} steps")


def _iterated(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _step()
        yield item


def _counted(piece: str) -> str:
    """A piece of the text."""
    left = _steps.get()
    left[1] -= len(piece)
    if left[1] < 0:
        raise jinja2.TemplateError("its text is too long")
    return piece


def _bounded(value: Any) -> Any:
    """A value that a template has made."""
    most = _steps.get()[1]
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
    return datetime.now().strftime(form)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
