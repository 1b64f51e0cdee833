"""Gets one answer: waits and retries while the service is unreachable, full or still loading.

`ask` always returns a `ChatAnswer`. Ctrl-C stops it and closes the connection. An answer that has started is never
requested again: if its stream breaks off, the partial text is kept, since a retry would give another text.
"""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

from gptcore.errors import FoundryError
from serve_app.chat.client import Piece, ServiceError, Unreachable

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.25, 8.0
STREAMED_SECONDS = 0.1
"""Shortest stream whose speed can be measured: a few of the service's events."""
ENDS = {"stop": "end of text", "length": "length reached"}
STOPPED, BROKEN_OFF = "stopped", "broken off"


@dataclass
class ChatAnswer:
    """The text of an answer and how it came about."""

    text: str = ""
    model: str = ""
    version: str = ""
    seed: int | None = None
    tokens: int = 0
    total_tokens: int | None = None
    """Of prompt and answer together, if the stream ended normally."""
    end: str | None = None
    problem: FoundryError | None = None
    """Why the answer is missing or incomplete."""
    asked: float = 0.0
    """Time of the request; like `first` and `last`, in seconds of `time.perf_counter`."""
    first: float | None = None
    last: float = 0.0
    at_first: int = 0

    @property
    def begun(self) -> bool:
        """Whether the service sent anything."""
        return self.model != ""

    @property
    def label(self) -> str:
        """The model and version that answered."""
        return f"{self.model} version {self.version}"

    @property
    def cut_short(self) -> str:
        """ "stopped" or "broken off" if the answer is incomplete, else an empty string."""
        return self.end if self.end in (STOPPED, BROKEN_OFF) else ""

    def take(self, piece: Piece) -> None:
        """Add a piece."""
        self.model, self.version, self.seed = piece.model, piece.version, piece.seed
        self.text += piece.text
        self.end = piece.end or self.end
        self.total_tokens = piece.total_tokens or self.total_tokens
        if piece.tokens:
            self.last = time.perf_counter()
            if self.first is None:
                self.first, self.at_first = self.last, piece.tokens
            self.tokens += piece.tokens

    def figures(self) -> str:
        """One line: model, tokens, speed."""
        count = f"{self.tokens} token{'' if self.tokens == 1 else 's'}"
        end = ENDS.get(self.end or "", self.end or "")
        parts = [self.label, count, f"{self.speed():.0f} tokens/s" if self.first else "", f"seed {self.seed}", end]
        return " · ".join(part for part in parts if part)

    def speed(self) -> float:
        """Tokens per second since the first token, so that waiting for it does not count.

        If the answer came all at once, that is not measurable, and the time counts from the request.
        """
        assert self.first is not None
        if self.last - self.first >= STREAMED_SECONDS:
            return (self.tokens - self.at_first) / (self.last - self.first)
        return self.tokens / (self.last - self.asked)


def ask(
    attempt: Callable[[], Generator[Piece, None, None]],
    show: Callable[[str], None],
    tell: Callable[[str], None],
    patience: float,
) -> ChatAnswer:
    """Get an answer from the stream that an `attempt` opens.

    If the service cannot answer now, retry for `patience` seconds.
    """
    answer, reported = ChatAnswer(), ""
    started, wait = time.monotonic(), FIRST_WAIT_SECONDS
    try:
        while True:
            answer.asked = time.perf_counter()
            try:
                with closing(attempt()) as pieces:
                    for piece in pieces:
                        answer.take(piece)
                        show(piece.text)
                return answer
            except FoundryError as error:
                pause = error.retry_after if isinstance(error, ServiceError) and error.retry_after else wait
                late = time.monotonic() + pause > started + patience
                if answer.begun or late or not is_temporary(error):
                    answer.problem = error
                    answer.end = BROKEN_OFF if answer.begun else None
                    return answer
                if str(error) != reported:
                    tell(f"{error}; trying again{_how(error)}")
                    reported = str(error)
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
    except KeyboardInterrupt:
        answer.end = STOPPED
        return answer


def is_temporary(error: FoundryError | None) -> bool:
    """Whether a retry may help."""
    return isinstance(error, Unreachable) or (isinstance(error, ServiceError) and error.temporary)


def _how(error: FoundryError) -> str:
    after = error.retry_after if isinstance(error, ServiceError) else None
    return f" in {after:g} s" if after else ""
