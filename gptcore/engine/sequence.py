"""A request on its way through the engine: the tokens it has, how many of them are computed, and in which slot.

The scheduler moves a sequence from phase to phase, the engine appends what was sampled. Nothing here knows torch.
"""

from enum import Enum, auto

import numpy as np

from gptcore.engine.interface import Request


class Phase(Enum):
    """Where a sequence is: WAITING for a slot, PREFILL of its prompt, DECODE token by token, FINISHED."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    FINISHED = auto()


class Sequence:
    """One request's state. While it decodes, `computed` is `len(tokens) - 1`: the last token was sampled, not run."""

    __slots__ = ("admitted", "arrived", "cached", "computed", "id", "phase", "prompt", "request", "slot", "tokens")

    def __init__(self, request: Request, arrived: float = 0.0) -> None:
        self.request = request
        self.id = request.request_id
        self.prompt = np.array(request.prompt, dtype=np.int32)
        self.tokens = list(request.prompt)
        """Prompt, then what was generated."""
        self.computed = 0
        """Positions whose keys and values the slot holds."""
        self.cached = 0
        """Prompt tokens found in the cache when the sequence was admitted."""
        self.slot = -1
        self.phase = Phase.WAITING
        self.arrived = arrived
        self.admitted = arrived
        """When the request came and when it got its slot, seconds of one monotonic clock."""

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - len(self.request.prompt)
