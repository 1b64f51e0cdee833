"""The turns of a chat, as messages or as one text, and how much of the text to send to the model.

The chat has no tokenizer, so it estimates a text's tokens from the usage of the last reply. If the estimate is too
low, the service refuses the prompt and the text is cut further.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

KEPT = 0.75
"""How much of the available room a cut text fills, so that the next cut is some answers away."""
CAUTION = 1.1
"""Safety factor on the estimated number of tokens."""


@dataclass(frozen=True)
class Turn:
    """What the user wrote, and how the model answered or continued."""

    prompt: str
    """Empty if the model was to continue its own text."""
    answer: str
    opens: bool
    """Whether a new text starts here, without the earlier ones."""
    ended: str = ""
    """Why the answer is incomplete: stopped, or broken off."""
    replies: bool = False
    """The model answered a conversation instead of continuing a text."""


@dataclass
class Conversation:
    """All turns of a chat. The current text starts at the last turn that opens one."""

    turns: list[Turn] = field(default_factory=list)
    skipped: int = 0
    """Characters at the start of the current text that are no longer sent."""
    dropped: int = 0
    """Messages at the start of the conversation that the service left out last."""
    density: float | None = None
    """Tokens per character in the last reply."""

    @property
    def current(self) -> list[Turn]:
        """The turns since the last one that opened a text."""
        return self.turns[max((place for place, turn in enumerate(self.turns) if turn.opens), default=0) :]

    @property
    def text(self) -> str:
        """The current text."""
        return _joined(self.current)

    def whole(self) -> str:
        """All texts, separated by empty lines."""
        texts: list[list[Turn]] = []
        for turn in self.turns:
            if turn.opens or not texts:
                texts.append([])
            texts[-1].append(turn)
        return "\n\n".join(map(_joined, texts))

    def added(self, line: str, opens: bool) -> str:
        """`line` in the form that is appended to the text: on a new line. An empty one adds nothing."""
        return line if opens else _added(self.text, line)

    def messages(self, system: str = "", newest: Turn | None = None, answered: bool = False) -> list[dict[str, str]]:
        """The current conversation in OpenAI's form, or the one that `newest` opens or goes on with.

        A prompt that got no answer is left out, but only if it must be `answered` when it is the last. Empty without
        messages beside the system's.
        """
        said: list[dict[str, str]] = []
        before = [] if newest and newest.opens else self.current
        for turn in [*before, *([newest] if newest else [])]:
            if turn.prompt:
                if said and said[-1]["role"] == "user":
                    said.pop()
                said.append({"role": "user", "content": turn.prompt})
            if turn.answer and said and said[-1]["role"] == "assistant":
                said[-1]["content"] += turn.answer
            elif turn.answer:
                said.append({"role": "assistant", "content": turn.answer})
        if answered and said and said[-1]["role"] == "user":
            said.pop()
        return [*([{"role": "system", "content": system}] if system and said else []), *said]

    def add(self, turn: Turn) -> None:
        """Add a finished turn."""
        if turn.opens:
            self.skipped = self.dropped = 0
        self.turns.append(turn)

    def undo(self) -> Turn | None:
        """Remove and return the last turn, if there is one."""
        self.skipped = self.dropped = 0
        return self.turns.pop() if self.turns else None

    def clear(self) -> None:
        """Delete all turns."""
        self.turns.clear()
        self.skipped = self.dropped = 0

    def forget_measure(self) -> None:
        """Reset what depends on the model: its token density and the cuts."""
        self.skipped, self.dropped, self.density = 0, 0, None

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


def _joined(turns: Iterable[Turn]) -> str:
    """One text: each prompt begins a line, and so does an answer that replies to it."""
    text = ""
    for turn in turns:
        text += _added(text, turn.prompt) + ("\n" if turn.prompt and turn.replies else "") + turn.answer
    return text


def _added(text: str, line: str) -> str:
    return f"\n{line}" if line and text and not text.endswith("\n") else line
