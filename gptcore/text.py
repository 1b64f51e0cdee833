"""Decodes a stream of tokens into text: whole characters only, and never part of a stop string.

Bytes that may still become a character, and text that may still become a stop string, are held back until it is clear.
"""

import codecs
from collections.abc import Sequence

from gptcore.tokenizer import Tokenizer


class TextStream:
    """The text of one sequence. `stopped` is true once a stop string is complete.

    The text ends before the first complete stop string; if several are complete at the same character, before the
    longest. So the end depends on the text only, not on how it is split into tokens. Invalid UTF-8 becomes U+FFFD.
    With `begins`, no text precedes it, and it has no leading space where the tokenizer has put one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), begins: bool = True) -> None:
        self.stopped = False
        self._tokenizer, self._silent, self._begins = tokenizer, tokenizer.special, begins
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = [_StopMatcher(text) for text in stop]
        self._pending = ""  # possibly the start of a stop string

    def push(self, token: int) -> str:
        """Add a token; return the text that is now certain, nothing once stopped. Special tokens have no text."""
        if token in self._silent:
            return ""
        content = self._tokenizer.decode_bytes([token])
        if self._begins and content:
            self._begins, content = False, self._tokenizer.first_bytes(token)
        return self._release(self._decoder.decode(content))

    def flush(self) -> str:
        """The rest of the text, when no more tokens follow."""
        text = self._release(self._decoder.decode(b"", final=True))
        if not self.stopped:
            text, self._pending = text + self._pending, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped or not text:
            return ""
        if not self._stops:
            return text
        held = len(self._pending)
        self._pending += text
        for end, character in enumerate(text, start=held + 1):
            complete = [stop.length for stop in self._stops if stop.follow(character)]
            if complete:
                self.stopped = True
                return self._take(end - max(complete))
        return self._take(len(self._pending) - max(stop.matched for stop in self._stops))

    def _take(self, begin: int) -> str:
        """Return the pending text up to `begin` and keep the rest."""
        free, self._pending = self._pending[:begin], self._pending[begin:]
        return free


class _StopMatcher:
    """How much of one stop string the text ends with, updated in amortised constant time per character.

    Knuth, Morris and Pratt (1977): after a mismatch, the next shorter prefix that the text also ends with is looked up,
    so no character is read twice.
    """

    def __init__(self, text: str) -> None:
        self.text, self.length, self.matched = text, len(text), 0
        self._shorter = [0, 0]  # for text[:n]: its longest proper prefix that is also a suffix
        for character in text[1:]:
            n = self._shorter[-1]
            while n and text[n] != character:
                n = self._shorter[n]
            self._shorter.append(n + (text[n] == character))

    def follow(self, character: str) -> bool:
        """Add the text's next character; true if the stop string is complete."""
        n = self.matched
        if n == self.length:
            n = self._shorter[n]
        while n and self.text[n] != character:
            n = self._shorter[n]
        self.matched = n + (self.text[n] == character)
        return self.matched == self.length
