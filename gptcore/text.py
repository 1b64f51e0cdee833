"""Token ids to text, one at a time: whole characters only, and never a part of a stop string.

In come a tokenizer, stop strings, and tokens as they are generated; out come pieces of text that may be shown at once.
What might still turn into a character or a stop string is held back until it does or does not.
"""

import codecs
from collections.abc import Sequence

from gptcore.tokenizer import Tokenizer


class TextStream:
    """The text of one sequence. `stopped` is true once a stop string was complete.

    The first stop string to be complete ends the text, and of several that end together the longest does; neither it
    nor anything behind it is ever released. So where the text ends depends on the text alone, not on how tokens cut
    it. Bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = [_StopMatcher(text) for text in stop]
        self._pending = ""  # a beginning of a stop string, perhaps

    def push(self, token: int) -> str:
        """The text that may be shown now that `token` has followed; nothing once stopped. <|endoftext|> has no text."""
        if token == self._tokenizer.eot:
            return ""
        return self._release(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def flush(self) -> str:
        """The rest, when no more tokens follow: half a character is none, and no stop string will be completed."""
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
        """What is held up to `begin`; the rest stays."""
        free, self._pending = self._pending[:begin], self._pending[begin:]
        return free


class _StopMatcher:
    """How much of one stop string the text ends with, kept up to date in constant time per character.

    Knuth, Morris and Pratt (1977): after a mismatch, the next shorter beginning of the string that the text also ends
    with is looked up, so no text is looked at twice.
    """

    def __init__(self, text: str) -> None:
        self.text, self.length, self.matched = text, len(text), 0
        self._shorter = [0, 0]  # for text[:n]: the longest shorter beginning that it also ends with
        for character in text[1:]:
            n = self._shorter[-1]
            while n and text[n] != character:
                n = self._shorter[n]
            self._shorter.append(n + (text[n] == character))

    def follow(self, character: str) -> bool:
        """Takes the text's next character; true if the stop string is complete."""
        n = self.matched
        if n == self.length:
            n = self._shorter[n]
        while n and self.text[n] != character:
            n = self._shorter[n]
        self.matched = n + (self.text[n] == character)
        return self.matched == self.length
