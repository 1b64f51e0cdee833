"""Conversations as prompts, and which of their oldest turns are left out when they are too long.

A turn is a message of the user with what follows it. System messages at the beginning belong to no turn and stay.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from gptcore.chat import ChatTemplate, Message


@dataclass(frozen=True)
class Conversation:
    """Messages, of which the model's chat template makes a prompt."""

    messages: Sequence[Message]
    generate: bool = True
    """The template begins an answer behind them."""
    continues: bool = False
    """The last message is continued."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template."""
    truncate: bool = False
    """The oldest turns are left out if there is no room for all."""

    @property
    def starts(self) -> list[int]:
        """Where what follows the system messages begins, and each later message of the user."""
        roles = [message["role"] for message in self.messages]
        head = next((place for place, role in enumerate(roles) if role != "system"), len(roles))
        return [head, *(place for place in range(head + 1, len(roles)) if roles[place] == "user")]


@dataclass(frozen=True)
class Encoded:
    """The tokens of a prompt."""

    ids: tuple[int, ...]
    dropped: int = 0
    """Messages that were left out."""


def encode_conversation(template: ChatTemplate, conversation: Conversation, room: int) -> Encoded:
    """The tokens of a conversation.

    One that may be truncated loses as few of its oldest turns as it must to have at most `room` tokens. Its last turn
    stays, however long it is. Raises ConfigError if the template refuses the messages.
    """
    messages, starts = conversation.messages, conversation.starts

    @cache
    def encoded(start: int) -> tuple[int, ...]:
        kept = [*messages[: starts[0]], *messages[start:]]
        return tuple(template.encode(kept, conversation.generate, conversation.continues, conversation.variables))

    def fits(start: int) -> bool:
        return len(encoded(start)) <= room

    last = len(starts) - 1
    if not conversation.truncate or not last or fits(starts[0]):
        return Encoded(encoded(starts[0]))
    start = starts[bisect_left(starts, True, 1, last, key=fits)]
    return Encoded(encoded(start), start - starts[0])
