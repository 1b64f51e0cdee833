"""Which turns of a conversation are left out so that the rest fits."""

from collections.abc import Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.chat import ChatTemplate, Message
from gptcore.parameters import SamplingParams
from serve_app.generation.conversation import Conversation, encode_conversation
from serve_app.generation.order import Order, room_for_prompt
from serve_app.settings import ServeSettings

ROLES = {"s": "system", "u": "user", "a": "assistant"}


class Sizes:
    """A template under which a message has as many tokens as its content says."""

    def encode(self, messages: Sequence[Message], *rest: Any) -> list[int]:
        return [0] * sum(message["size"] for message in messages)


TEMPLATE = cast(ChatTemplate, Sizes())


def conversation(roles: str, sizes: Sequence[int] = (), **fields: Any) -> Conversation:
    sizes = [*sizes, *[1] * len(roles)][: len(roles)]
    messages = [{"role": ROLES[role], "size": size} for role, size in zip(roles, sizes, strict=True)]
    return Conversation(messages, **{"truncate": True} | fields)


@pytest.mark.parametrize(
    ("roles", "room", "dropped"),
    [
        ("uauau", 5, 0),
        ("uauau", 4, 2),
        ("uauau", 2, 4),
        ("uauau", 0, 4),  # the last turn stays
        ("suauau", 5, 2),
        ("suauau", 1, 4),
        ("ssuau", 3, 2),
        ("auau", 3, 1),  # a greeting
        ("uuau", 3, 1),
        ("uasuau", 4, 3),  # a system message within a turn goes with it
        ("uaua", 2, 2),  # the last message is continued
        ("s", 0, 0),
        ("aa", 0, 0),
    ],
)
def test_whole_turns_are_left_out_and_the_system_stays(roles: str, room: int, dropped: int) -> None:
    encoded = encode_conversation(TEMPLATE, conversation(roles), room)
    assert (encoded.dropped, len(encoded.ids)) == (dropped, len(roles) - dropped)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(0, 99))
def test_no_more_turns_are_left_out_than_needed(sizes: list[int], room: int) -> None:
    asked = conversation("u" * len(sizes), sizes)
    dropped = encode_conversation(TEMPLATE, asked, room).dropped
    assert sum(sizes[dropped:]) <= room or dropped == len(sizes) - 1
    assert not dropped or sum(sizes[dropped - 1 :]) > room


def test_nothing_is_left_out_unless_it_is_asked_for() -> None:
    assert encode_conversation(TEMPLATE, conversation("uau", truncate=False), 1).dropped == 0


@pytest.mark.parametrize(
    ("length", "default", "most", "room"),
    [(10, False, 0, 90), (100, False, 0, 75), (4096, True, 0, 75), (10, True, 0, 90), (10, False, 50, 50)],
    ids=["asked for", "more than there is", "a quarter", "the service's own limit", "the limit on prompts"],
)
def test_room_is_left_for_the_answer(length: int, default: bool, most: int, room: int) -> None:
    order = Order(None, [conversation("u")], SamplingParams(max_new_tokens=length), default_length=default)
    assert room_for_prompt(order, 100, ServeSettings(max_prompt_tokens=most)) == room
