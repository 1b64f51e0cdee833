"""The state of one request in the engine: its tokens, how many of them are computed, and its slot.

The scheduler changes its phase, the engine appends sampled tokens. No torch here.
"""

from enum import Enum, auto

import numpy as np

from gptcore.engine.interface import Request
from gptcore.engine.speculation import Lookup


class Phase(Enum):
    """Where a sequence is: WAITING for a slot, PREFILL of its prompt, DECODE token by token, FINISHED."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    FINISHED = auto()


class Sequence:
    """One request's state. In phase DECODE, `computed` is `len(tokens) - 1`: the last token was sampled but not run."""

    __slots__ = (
        "admitted", "arrived", "cached", "computed", "draft", "id", "lookup", "phase", "prompt", "request", "slot",
        "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, arrived: float = 0.0) -> None:
        self.request = request
        self.id = request.request_id
        self.prompt = np.array(request.prompt, dtype=np.int32)
        self.tokens = list(request.prompt)
        """The prompt and the generated tokens."""
        self.computed = 0
        """Positions whose keys and values are in the slot."""
        self.lookup = Lookup(self.tokens)
        self.draft: list[int] = []
        """Guesses of the next tokens, to be run in this step after the last token."""
        self.cached = 0
        """Prompt tokens found in the cache when the sequence was admitted."""
        self.slot = -1
        self.phase = Phase.WAITING
        self.arrived = arrived
        self.admitted = arrived
        """When the request came and when it got its slot, in seconds of a monotonic clock."""

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - len(self.request.prompt)

    def accept(self, right: int) -> None:
        """Record that the first `right` draft tokens were right: computed, and appended by the engine."""
        self.computed += right
        self.draft = []
