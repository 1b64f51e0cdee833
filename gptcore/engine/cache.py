"""Who has which slot of the key/value cache, and which tokens each slot holds. The keys and values are the runner's.

A slot keeps its tokens when it is freed, until it is taken again, least recently used first. So a prompt that begins
like an earlier one finds its beginning computed: in a free slot, which is then taken as it is, or in one at work, from
which it is copied. A sequence still computing its prompt promises the rest of it, for which it can be worth waiting.
"""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

import numpy as np

from gptcore.errors import EngineError

WORTHWHILE = 16
"""Tokens in common below which neither reuse nor waiting pays: computing them costs less than a good slot lost."""


@dataclass(frozen=True)
class Match:
    """The longest usable beginning of a prompt: `length` tokens held by `slot`, `promised` once prompts are computed.

    Without a match, slot is -1 and length 0.
    """

    slot: int
    length: int
    promised: int


@dataclass(frozen=True)
class Placement:
    """A slot that was taken. Its first `length` positions are usable, once copied from slot `source` unless None."""

    slot: int
    length: int
    source: int | None


class SlotCache:
    """The slots of one engine.

    `granularity` is the runner's: reuse ends at a multiple of it. Unless the runner is `invariant`, what was
    decoded is not reused, only prompts. `reuse=False` turns all reuse off.
    """

    def __init__(
        self, slots: int, context_length: int, invariant: bool = True, granularity: int = 1, reuse: bool = True
    ) -> None:
        self.slots = slots
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
        """Slots that nobody has."""
        return len(self._free)

    def find(self, prompt: np.ndarray) -> Match:
        """What the slots hold of `prompt` (T,). Its last token never counts: it is run for its logits."""
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
        # A free slot saves the copy; of several, the one whose turn it is.
        slot = next((slot for slot in self._free if slot in best), best[0])
        return Match(slot, length, promised)

    def take(self, owner: str, prompt: np.ndarray, match: Match) -> Placement:
        """Gives `owner` a slot for `prompt` (T,), with what `match` found of it. There must be a free one."""
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
        """The first `length` tokens of the prompt in `slot` are computed."""
        self._computed[slot] = length

    def release(self, owner: str, slot: int, prompt_length: int, tokens: Tokens[int], computed: int) -> None:
        """Takes `slot` back from `owner`. It keeps what can be reused of the first `computed` of `tokens`."""
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
        """Raises EngineError unless exactly `owners` (id to slot) have slots, one each, and all others are free."""
        taken = {(owner, slot) for slot, owner in enumerate(self._owners) if owner is not None}
        if taken != set(owners.items()):
            raise EngineError(f"slots and sequences disagree about {sorted(taken ^ set(owners.items()))}")
        free = {slot for slot, owner in enumerate(self._owners) if owner is None}
        if free != set(self._free):
            raise EngineError(f"slots {sorted(free ^ set(self._free))} are neither free nor taken, or both")
        if (self._computed > self._promised).any() or (self._promised > self._tokens.shape[1]).any():
            raise EngineError(f"slots hold {self._computed.tolist()} of {self._promised.tolist()} tokens")
