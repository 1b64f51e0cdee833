"""How the tokens of a published vocabulary spell text: the decoder of a tokenizer.json, one token at a time."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gptcore.errors import excerpt
from gptcore.merges import byte_characters

DECODERS = "ByteLevel, Metaspace, or Replace, ByteFallback, Fuse and Strip in this order"


@dataclass(frozen=True)
class Spelling:
    """How tokens of the vocabulary spell text: tokenizer.json's decoder, one token at a time."""

    byte_level: bool = False
    """Each character stands for a byte, as in GPT-2."""
    replaced: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    """<0x41> is the byte 0x41."""
    strips: bool = False
    """One space at the beginning of a text is dropped."""
    drops: str = ""
    """The character that the first token of a text loses."""

    def middle(self, token: str) -> bytes:
        """The bytes of `token` behind another."""
        if self.byte_level:
            byte_of = _byte_of()
            return bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode()
        for old, new in self.replaced:
            token = token.replace(old, new)
        if self.byte_fallback and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes.fromhex(token[3:5])
        return token.encode()

    def first(self, token: str) -> bytes:
        """The bytes of `token` at the beginning of a text."""
        if self.drops:
            return self.middle(token.replace(self.drops, ""))
        return self.middle(token).removeprefix(b" " if self.strips else b"")


def spelling_of(decoder: Mapping[str, Any] | None) -> Spelling:
    """The decoder, a token at a time. Raises ValueError for one that cannot be computed so."""
    parts = [*steps(decoder, "decoders")]
    kinds = [part["type"] for part in parts]
    order = ("Replace", "ByteFallback", "Fuse", "Strip")
    if kinds == ["ByteLevel"]:
        return Spelling(byte_level=True)
    if kinds == ["Metaspace"]:
        mark = parts[0]["replacement"]
        keeps = parts[0].get("prepend_scheme") == "never" or parts[0].get("add_prefix_space") is False
        return Spelling(replaced=((mark, " "),), drops="" if keeps else mark)
    places = [order.index(kind) if kind in order else -1 for kind in kinds]
    strips = [(part["content"], part["start"], part["stop"]) for part in parts if part["type"] == "Strip"]
    patterns = [part["pattern"].get("String") for part in parts if part["type"] == "Replace"]
    fits = places == sorted(places) and -1 not in places and None not in patterns
    if not kinds or not fits or strips not in ([], [(" ", 1, 0)]) or (strips and "Fuse" not in kinds):
        raise ValueError(f"its decoder is {excerpt(decoder)}; expected {DECODERS}")
    replaced = tuple((part["pattern"]["String"], part["content"]) for part in parts if part["type"] == "Replace")
    return Spelling(replaced=replaced, byte_fallback="ByteFallback" in kinds, strips=bool(strips))


def steps(part: Mapping[str, Any] | None, key: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a part of tokenizer.json, those of sequences one by one."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for step in part[key]:
        yield from steps(step, key)


@lru_cache
def _byte_of() -> dict[str, int]:
    """The byte for which each of GPT-2's printable characters stands."""
    return {character: b for b, character in byte_characters().items()}
