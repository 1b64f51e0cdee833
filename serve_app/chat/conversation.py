"""The text of a chat, turn by turn, and how much of it to send to the model.

The chat has no tokenizer, so it estimates a text's tokens from the usage of the last reply. If the estimate is too
low, the service refuses the prompt and the text is cut further.
"""

from dataclasses import dataclass, field

KEPT = 0.75
"""How much of the available room a cut text fills, so that the next cut is some answers away."""
CAUTION = 1.1
"""Safety factor on the estimated number of tokens."""


@dataclass(frozen=True)
class Turn:
    """What the user added to the text, and how the model continued."""

    prompt: str
    answer: str
    opens: bool
    """Whether a new text starts here, without the earlier ones."""
    ended: str = ""
    """Why the answer is incomplete: stopped, or broken off."""


@dataclass
class Conversation:
    """All turns of a chat. The current text starts at the last turn that opens one."""

    turns: list[Turn] = field(default_factory=list)
    skipped: int = 0
    """Characters at the start of the current text that are no longer sent."""
    density: float | None = None
    """Tokens per character in the last reply."""

    @property
    def text(self) -> str:
        """The current text."""
        return "".join(turn.prompt + turn.answer for turn in self.turns[self._opening() :])

    def whole(self) -> str:
        """All texts, separated by empty lines."""
        parts = [("\n\n" if n and turn.opens else "") + turn.prompt + turn.answer for n, turn in enumerate(self.turns)]
        return "".join(parts)

    def added(self, line: str, opens: bool) -> str:
        """`line` in the form that is appended to the text: on a new line."""
        return line if opens or not self.text or self.text.endswith("\n") else f"\n{line}"

    def add(self, turn: Turn) -> None:
        """Add a finished turn."""
        if turn.opens:
            self.skipped = 0
        self.turns.append(turn)

    def undo(self) -> Turn | None:
        """Remove and return the last turn, if there is one."""
        self.skipped = 0
        return self.turns.pop() if self.turns else None

    def clear(self) -> None:
        """Delete all turns."""
        self.turns.clear()
        self.skipped = 0

    def forget_measure(self) -> None:
        """Reset what depends on the model: its token density and the cut."""
        self.skipped, self.density = 0, None

    def measure(self, text: str, tokens: int) -> None:
        """Learn the token density from a reply."""
        if text:
            self.density = tokens / len(text)

    def fit(self, text: str, newest: int, context: int | None, wanted: int) -> str:
        """The part of `text` to send: its end, with at least the `newest` last characters.

        `wanted` tokens of the context are kept free for the answer, but at most half of it.
        """
        if context is not None:
            room = context - min(wanted, context // 2)
            density = CAUTION * self.density if self.density else len(text.encode()) / max(1, len(text))
            if (len(text) - self.skipped) * density > room:
                self._skip_to(text, len(text) - int(KEPT * room / density), newest)
        return text[self.skipped :]

    def cut(self, text: str, newest: int) -> bool:
        """Leave out half of the older text; False if there is none left."""
        last = len(text) - newest
        before = self.skipped
        self._skip_to(text, (before + last + 1) // 2, newest)
        return self.skipped > before

    def _opening(self) -> int:
        return max((index for index, turn in enumerate(self.turns) if turn.opens), default=0)

    def _skip_to(self, text: str, place: int, newest: int) -> None:
        """Start at `place`, moved to the next start of a line or word, but never within the newest text."""
        last = len(text) - max(newest, 1)
        near = place + max(20, (len(text) - place) // 4)
        for border in ("\n", " "):
            found = text.find(border, place, near)
            if found != -1:
                place = found + 1
                break
        self.skipped = max(self.skipped, min(place, last))
