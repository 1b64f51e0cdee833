"""Chats as text: a model's chat template, and the tokens of a conversation.

In: messages in OpenAI's form, and the template of the model's package, in Jinja as `transformers` has it. Out: the text
that the template makes of them, and its ids, which are those of `apply_chat_template` with one exception: what was
typed into a message never becomes a special token, whatever it spells.

A template comes with a model that somebody else may have published. It runs in Jinja's sandbox, and its steps and its
text are bounded.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jinja2

from gptcore.errors import ConfigError, PackageError
from gptcore.hf_tokenizer import CONFIG
from gptcore.template_sandbox import (
    FIXED_DAY,
    MISTAKES,
    MOST_CHARACTERS,
    MOST_STEPS,
    Sandbox,
    counted,
    left_over,
    one_line,
    today,
    watched,
)
from gptcore.tokenizer import CHAT, Tokenizer, with_chat_tokens

Message = Mapping[str, Any]
"""`role` and `content`, and whatever else a template knows."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The template of models that have no other: OpenAI's ChatML."""
GUARDS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Unicode's noncharacters, which no text should contain."""
CUT = "\U0001fffe "
"""Another noncharacter, which ends a message that goes on; the space shows whether the template trims."""


class ChatTemplate:
    """A compiled template with the names of a tokenizer's special tokens.

    Raises PackageError for a template that is not valid Jinja.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.source, self.tokenizer = source, tokenizer
        try:
            sandbox = Sandbox()
            self._template = sandbox.from_string(watched(sandbox.parse(source)))
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            raise PackageError(f"the chat template cannot be compiled: {one_line(error)}") from error

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
        token = left_over.set([MOST_STEPS, MOST_CHARACTERS + 2 * size])
        given = {"tools": None, "documents": None} | self.tokenizer.special_names | dict(variables or {})
        try:
            pieces = self._template.generate(given | {"messages": messages, "add_generation_prompt": generate})
            text = "".join(map(counted, pieces))
        except (jinja2.TemplateError, *MISTAKES) as error:
            why = f"the model's chat template refuses the messages: {one_line(error)}"
            raise ConfigError(why, "messages") from error
        finally:
            left_over.reset(token)
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

        That is what a model is trained on: from where the template begins an answer to the token that ends its turn,
        unless the message has the weight 0, as in OpenAI's format. A template that writes the date writes FIXED_DAY.
        Raises ConfigError as `encode` does, and for a template that does not keep each answer and end it with a special
        token.
        """
        guard, free, opens, closes = _unused(messages, 4)
        guarded = [_guard(message, self._spelled, guard) for message in messages]
        before = today.set(FIXED_DAY)
        try:
            text = self._marked(guarded, opens, closes)
            spans = self._spans(text, opens, closes)
        finally:
            today.reset(before)
        weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
        if len(spans) != len(weights):
            raise ConfigError("the model's chat template leaves out an answer", "messages")
        ids, ours, number = [], [], 0
        for token, place in self.tokenizer.encode_special(text, guard + opens + closes, free):
            while number < len(spans) and place >= spans[number][1]:
                number += 1
            ids.append(token)
            ours.append(number < len(spans) and place >= spans[number][0] and bool(weights[number]))
        return ids, ours

    def _spans(self, text: str, opens: str, closes: str) -> list[tuple[int, int]]:
        """Where each answer begins, and where its turn ends. Raises ConfigError.

        A template may drop the mark `opens` with the thinking at the beginning of an answer.
        """
        (beginning, lead), spans, behind = self._beginning, [], 0
        for closed in re.finditer(closes, text):
            opened = text.find(opens, behind, closed.start())
            limit = closed.start() if opened < 0 else opened
            begun = text.rfind(beginning, behind, limit) if beginning else -1
            led = text.rfind(lead.rstrip(), behind, limit) if lead.strip() else -1
            if begun >= 0:
                start = begun + len(beginning)
            elif led >= 0:
                start = led
            elif opened >= 0:
                start = behind + len(text[behind:opened].rstrip())
            else:
                raise ConfigError("the model's chat template changes the text of an answer", "messages")
            behind = self._end_of_turn(text, closed.end())
            spans.append((start, behind))
        return spans

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
        """The text with `opens` and `closes` around each answer, inside the white space that a template may trim.

        Raises ConfigError.
        """
        marked = [
            {**m, "content": _edged(m["content"], opens, closes)} if m["role"] == "assistant" else m for m in messages
        ]
        text = self.render(marked, generate=False)
        if text.translate({ord(opens): None, ord(closes): None}) != self.render(messages, generate=False):
            raise ConfigError("the model's chat template changes the text of an answer", "messages")
        return text

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


def _edged(content: str, opens: str, closes: str) -> str:
    """The content with marks around all but its outer white space."""
    core = content.strip()
    before, _, after = content.partition(core) if core else (content, "", "")
    return f"{before}{opens}{core}{closes}{after}"


def _characters(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 1
