"""Text is released in whole characters, as early as possible, and never with a part of a stop string."""

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gptcore.text import TextStream
from gptcore.tokenizer import Tokenizer
from tests.chance import examples

ALPHABET = "abé🧑"


def stream(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    """The piece that each token releases, and what the end does."""
    text = TextStream(tokenizer, stop)
    return [*(text.push(token) for token in tokens), text.flush()], text


def until_stop(text: str, stops: tuple[str, ...]) -> str:
    """By definition: the shortest beginning of `text` that ends with a stop string, without the longest such."""
    for end in range(len(text) + 1):
        if ended := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, ended))]
    return text


def safe(text: str, stops: tuple[str, ...]) -> str:
    """By definition: `text` without the longest ending that a stop string begins with."""
    for begin in range(len(text) + 1):
        if any(stop.startswith(text[begin:]) for stop in stops if text[begin:]):
            return text[:begin]
    return text


def test_half_a_character_waits_for_its_other_half(byte_tokenizer: Tokenizer) -> None:
    pieces, _ = stream(byte_tokenizer, [*"aé中🧑".encode()])
    assert pieces == ["a", "", "é", "", "", "中", "", "", "", "🧑", ""]


def test_invalid_bytes_become_replacement_characters(byte_tokenizer: Tokenizer) -> None:
    tokens = [*b"a\xffb\xe4\xb8c\xe4\xb8"]
    pieces, _ = stream(byte_tokenizer, tokens)
    assert pieces == ["a", "\ufffd", "b", "", "", "\ufffdc", "", "", "\ufffd"]
    assert "".join(pieces) == byte_tokenizer.decode(tokens)


def test_the_end_of_text_token_has_no_text(byte_tokenizer: Tokenizer) -> None:
    pieces, _ = stream(byte_tokenizer, [ord("a"), byte_tokenizer.eot, ord("b")])
    assert pieces == ["a", "", "b", ""]


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("one. Two", (". ",), ["o", "n", "e", "", "", "", "", "", ""]),
        ("a.b. c", (". ",), ["a", "", ".b", "", "", "", ""]),
        ("xabcy", ("abcd", "bc"), ["x", "", "", "a", "", ""]),
        ("xabcd", ("abcd", "cd"), ["x", "", "", "", "", ""]),
        ("ends in a be", ("begin",), [*"ends in a ", "", "", "be"]),
        ("ababac", ("abac",), ["", "", "", "ab", "", "", ""]),
    ],
)
def test_the_possible_beginning_of_a_stop_string_is_held_back(
    byte_tokenizer: Tokenizer, text: str, stop: tuple[str, ...], pieces: list[str]
) -> None:
    assert stream(byte_tokenizer, [*text.encode()], stop)[0] == pieces


@examples(400)
@given(
    st.text(ALPHABET, max_size=40),
    st.lists(st.text(ALPHABET, min_size=1, max_size=6), max_size=4).map(tuple),
)
@example("aabaabaab", ("aabaabaaab", "baabaaa", "aab" * 3))
def test_every_token_releases_all_text_that_is_safe_and_no_more(
    byte_tokenizer: Tokenizer, text: str, stops: tuple[str, ...]
) -> None:
    stream = TextStream(byte_tokenizer, stops)
    out = ""
    for end, character in enumerate(text, start=1):
        out += "".join(stream.push(byte) for byte in character.encode())
        until = until_stop(text[:end], stops)
        stopped = until != text[:end]
        assert stream.stopped == stopped
        assert out == (until if stopped else safe(until, stops))
    assert out + stream.flush() == until_stop(text, stops)
    if stream.stopped:
        assert stream.push(ord("a")) + stream.flush() == ""


def test_where_the_text_ends_does_not_depend_on_how_tokens_cut_it(byte_tokenizer: Tokenizer, learn) -> None:
    text = "the end of the beginning of the end. the end of all ends"
    large = learn(266, text)
    assert len(large.encode(text)) < len(text)
    for stops in ((" of all", "all"), ("the end.",), ("ning of the", "beginning"), ("nothing",)):
        texts = {"".join(stream(t, t.encode(text), stops)[0]) for t in (byte_tokenizer, large)}
        assert texts == {until_stop(text, stops)}


def test_a_stop_string_that_the_end_completes_is_not_released(byte_tokenizer: Tokenizer) -> None:
    pieces, text = stream(byte_tokenizer, [*b"ab\xe4"], ("b\ufffd",))
    assert pieces == ["a", "", "", ""]
    assert text.stopped


def test_many_long_stop_strings_cost_little_per_character(byte_tokenizer: Tokenizer) -> None:
    dice = random.Random(1)
    stops = tuple("a" * 255 + chr(ord("b") + i) for i in range(16))
    stream, steps = TextStream(byte_tokenizer, stops), 0
    for stop in stream._stops:  # counts how often a shorter beginning is tried

        class Counted(list):
            def __getitem__(self, n):
                nonlocal steps
                steps += 1
                return list.__getitem__(self, n)

        stop._shorter = Counted(stop._shorter)
    length = 4000
    for _ in range(length):
        stream.push(ord(dice.choices("az", (50, 1))[0]))
    assert not stream.stopped
    assert steps <= 16 * 2 * length
