"""The text that person and model write at, turn by turn, and how much of it the model is given.

In come what was said and what was answered; out comes the text to continue. The model's tokens are the service's
affair, so how many a text has is estimated from the last reply's usage; the service has the last word.
"""

from dataclasses import dataclass, field

KEPT = 0.75
"""Share of the room that is kept when the text is cut: the next cut is some answers away."""
CAUTION = 1.1
"""By how much a text may have more tokens than the last ones make expect."""


@dataclass(frozen=True)
class Turn:
    """What a person added to the text, and how the model went on."""

    prompt: str
    answer: str
    opens: bool
    """Whether a new text begins here, which knows nothing of those before."""
    ended: str = ""
    """Why the answer is not whole: stopped, or broken off."""


@dataclass
class Conversation:
    """All turns of a chat. The current text is what was written since the last turn that opens one."""

    turns: list[Turn] = field(default_factory=list)
    skipped: int = 0
    """Characters at the current text's beginning that the model is no longer given."""
    density: float | None = None
    """Tokens per character, as the last answer had them."""

    @property
    def text(self) -> str:
        """The current text."""
        return "".join(turn.prompt + turn.answer for turn in self.turns[self._opening() :])

    def whole(self) -> str:
        """Every text that was written, an empty line between them."""
        parts = [("\n\n" if n and turn.opens else "") + turn.prompt + turn.answer for n, turn in enumerate(self.turns)]
        return "".join(parts)

    def added(self, line: str, opens: bool) -> str:
        """`line` as it is put behind the text: on a line of its own."""
        return line if opens or not self.text or self.text.endswith("\n") else f"\n{line}"

    def add(self, turn: Turn) -> None:
        """Takes a turn that is over."""
        if turn.opens:
            self.skipped = 0
        self.turns.append(turn)

    def undo(self) -> Turn | None:
        """Takes back the last turn, if there is one."""
        self.skipped = 0
        return self.turns.pop() if self.turns else None

    def clear(self) -> None:
        """Forgets everything that was written."""
        self.turns.clear()
        self.skipped = 0

    def forget_measure(self) -> None:
        """For another model, whose tokens and context are others."""
        self.skipped, self.density = 0, None

    def measure(self, text: str, tokens: int) -> None:
        """Learns from a reply how many tokens a text has."""
        if text:
            self.density = tokens / len(text)

    def fit(self, text: str, newest: int, context: int | None, wanted: int) -> str:
        """The part of `text` that is to be sent: its end, with at least the `newest` last characters.

        Of a context of so many tokens, the `wanted` ones of the answer are kept free, up to a half.
        """
        if context is not None:
            room = context - min(wanted, context // 2)
            density = CAUTION * self.density if self.density else len(text.encode()) / max(1, len(text))
            if (len(text) - self.skipped) * density > room:
                self._skip_to(text, len(text) - int(KEPT * room / density), newest)
        return text[self.skipped :]

    def cut(self, text: str, newest: int) -> bool:
        """Leaves out half of what is older than the newest; False if there is no such thing."""
        last = len(text) - newest
        before = self.skipped
        self._skip_to(text, (before + last + 1) // 2, newest)
        return self.skipped > before

    def _opening(self) -> int:
        return max((index for index, turn in enumerate(self.turns) if turn.opens), default=0)

    def _skip_to(self, text: str, place: int, newest: int) -> None:
        """Begins at `place` or at the next line's or word's beginning, never within the newest."""
        last = len(text) - max(newest, 1)
        near = place + max(20, (len(text) - place) // 4)
        for border in ("\n", " "):
            found = text.find(border, place, near)
            if found != -1:
                place = found + 1
                break
        self.skipped = max(self.skipped, min(place, last))
