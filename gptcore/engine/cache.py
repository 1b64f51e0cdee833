"""Tracks the owner and the tokens of each slot of the key/value cache. The runner stores the keys and values.

A freed slot keeps its tokens until it is taken again, least recently used first. A prompt that starts like an earlier
one reuses the common prefix: in a free slot, which it then takes, or in a slot in use, from which it is copied. The
rest of a prompt still being computed counts as promised, and it can be worth waiting for.
"""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

import numpy as np

from gptcore.errors import EngineError

WORTHWHILE = 16
"""Least common tokens for reuse or waiting: computing fewer costs less than losing a useful slot."""


@dataclass(frozen=True)
class Match:
    """The longest usable prefix of a prompt: `length` tokens in `slot`, and `promised` once other prompts are computed.

    Without a match, slot is -1 and length 0.
    """

    slot: int
    length: int
    promised: int


@dataclass(frozen=True)
class Placement:
    """A taken slot. Its first `length` positions are usable, after a copy from slot `source` unless that is None."""

    slot: int
    length: int
    source: int | None


class SlotCache:
    """The slots of one engine.

    `granularity` is the runner's: reuse ends at a multiple of it. If the runner is not `invariant`, only prompts are
    reused, not generated tokens. `reuse=False` turns reuse off.
    """

    def __init__(
        self, slots: int, context_length: int, invariant: bool = True, granularity: int = 1, reuse: bool = True
    ) -> None:
        self.slots = slots
        self.context_length = context_length
        self.invariant = invariant
        self.granularity = granularity
        self.reuse = reuse
        self._tokens = np.full((slots, context_length), -1, dtype=np.int32)
        self._computed = np.zeros(slots, dtype=np.int64)  # positions that are computed
        self._promised = np.zeros(slots, dtype=np.int64)  # these, and the rest of a prompt being computed
        self._owners: list[str | None] = [None] * slots
        self._free: dict[int, None] = dict.fromkeys(range(slots))  # in order: least recently used first

    @property
    def free(self) -> int:
        """The number of free slots."""
        return len(self._free)

    def find(self, prompt: np.ndarray) -> Match:
        """The longest cached prefix of `prompt` (T,), without its last token, which must be run for its logits."""
        g, n = self.granularity, len(prompt) - 1
        if not self.reuse or n < max(WORTHWHILE, g):
            return Match(-1, 0, 0)
        alike = self._tokens[:, :n] == prompt[:n]  # (slots, n)
        common = np.where(alike.all(axis=1), n, alike.argmin(axis=1))  # argmin: where the first difference is
        held = np.minimum(common, self._computed) // g * g
        promised = int(np.minimum(common, self._promised).max()) // g * g
        length = int(held.max())
        if length < WORTHWHILE:
            return Match(-1, 0, promised)
        best = np.flatnonzero(held == length).tolist()
        # A free slot saves the copy; of several, the least recently used.
        slot = next((slot for slot in self._free if slot in best), best[0])
        return Match(slot, length, promised)

    def take(self, owner: str, prompt: np.ndarray, match: Match) -> Placement:
        """Give `owner` a slot for `prompt` (T,), reusing `match`. Raises EngineError if none is free."""
        if not self._free:
            raise EngineError(f"{owner!r} was to have a slot, and all {self.slots} are taken")
        source: int | None = None
        if match.length and match.slot in self._free:
            slot = match.slot
        else:
            slot = next(iter(self._free))
            source = match.slot if match.length else None
        del self._free[slot]
        self._owners[slot] = owner
        self._tokens[slot, : len(prompt)] = prompt
        self._computed[slot] = match.length
        self._promised[slot] = len(prompt)
        return Placement(slot, match.length, source)

    def advance(self, slot: int, length: int) -> None:
        """Record that the first `length` tokens of the prompt in `slot` are computed."""
        self._computed[slot] = length

    def release(self, owner: str, slot: int, prompt_length: int, tokens: Tokens[int], computed: int) -> None:
        """Free `owner`'s slot. It keeps the reusable part of the first `computed` of `tokens`."""
        if self._owners[slot] != owner:
            raise EngineError(f"{owner!r} gives back slot {slot}, which belongs to {self._owners[slot]!r}")
        if self.invariant and computed > prompt_length:
            self._tokens[slot, prompt_length:computed] = tokens[prompt_length:computed]
            kept = computed
        else:
            kept = min(computed, prompt_length)
        self._computed[slot] = self._promised[slot] = kept
        self._owners[slot] = None
        self._free[slot] = None

    def check(self, owners: dict[str, int]) -> None:
        """Raises EngineError unless exactly `owners` (id to slot) have slots, and all others are free."""
        taken = {(owner, slot) for slot, owner in enumerate(self._owners) if owner is not None}
        if taken != set(owners.items()):
            raise EngineError(f"slots and sequences disagree about {sorted(taken ^ set(owners.items()))}")
        free = {slot for slot, owner in enumerate(self._owners) if owner is None}
        if free != set(self._free):
            raise EngineError(f"slots {sorted(free ^ set(self._free))} are neither free nor taken, or both")
        if (self._computed > self._promised).any() or (self._promised > self._tokens.shape[1]).any():
            raise EngineError(f"slots hold {self._computed.tolist()} of {self._promised.tolist()} tokens")
