"""Decides which sequences run in the next step, and how many of their tokens. Plain Python without torch.

Every decoding sequence is in every `ScheduledStep`, with its last token and perhaps a draft (speculation.py). In
addition, at most `prefill_tokens` prompt tokens are computed, the earliest admitted first, so a long prompt takes
several steps and decoding never waits for it. Admission is first come, first served: a request is admitted when a slot
is free and the step has prompt tokens left. It waits, with all requests after it, while a prompt being computed starts
like its own, so that it can copy that prefix. That prompt grows with every step, so the wait ends.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from gptcore.engine.cache import WORTHWHILE, Match, SlotCache
from gptcore.engine.sequence import Phase, Sequence
from gptcore.engine.speculation import Speculation
from gptcore.errors import EngineError, QueueFull


@dataclass(frozen=True)
class ScheduledStep:
    """One step: first `copies` (source slot, target slot, positions), in order, then `work`.

    `work` lists sequences with the number of tokens to run, from `computed` on, with their drafts; decoding sequences
    come first.
    """

    work: list[tuple[Sequence, int]]
    copies: list[tuple[int, int, int]] = field(default_factory=list)


class Scheduler:
    """The queue, the running sequences, and the rules for admission."""

    def __init__(
        self, cache: SlotCache, prefill_tokens: int, max_queue: int, speculation: Speculation | None = None
    ) -> None:
        """Without `speculation` there are no drafts."""
        g = cache.granularity
        self.cache = cache
        self.max_queue = max_queue
        self.speculation = speculation
        self.prefill_tokens = -(-prefill_tokens // g) * g  # whole chunks, so that every prompt makes progress
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []

    @property
    def running(self) -> int:
        """Sequences that have a slot."""
        return len(self.prefilling) + len(self.decoding)

    @property
    def queues(self) -> dict[Phase, Iterable[Sequence]]:
        """All sequences, by phase."""
        return {Phase.WAITING: self.waiting, Phase.PREFILL: self.prefilling, Phase.DECODE: self.decoding}

    def add(self, sequence: Sequence) -> None:
        """Add `sequence` to the queue. Raises QueueFull if the queue is full; each free slot is room for one more."""
        if len(self.waiting) >= self.max_queue + self.cache.free:
            raise QueueFull(
                f"{len(self.waiting)} requests wait for one of {self.cache.slots} slots; no more than {self.max_queue} "
                "may. Try again later"
            )
        self.waiting.append(sequence)

    def schedule(self, now: float = 0.0) -> ScheduledStep:
        """Schedule the next step. Newly admitted sequences get a slot, and `now` as their time of admission."""
        if self.speculation:
            self._draft(self.speculation)
        step = ScheduledStep([(sequence, 1 + len(sequence.draft)) for sequence in self.decoding])
        budget = self.prefill_tokens
        for sequence in self.prefilling:
            budget -= self._share(step, sequence, budget)
        while budget > 0 and self.waiting and self.cache.free:
            sequence = self.waiting[0]
            match = Match(-1, 0, 0) if sequence.request.prompt_logprobs else self.cache.find(sequence.prompt)
            if match.promised - match.length >= WORTHWHILE:
                break
            if not self._affordable(sequence.prompt_length - match.length, budget):
                break
            self._admit(step, self.waiting.popleft(), match, now)
            budget -= self._share(step, sequence, budget)
        return step

    def advance(self, sequence: Sequence, count: int) -> bool:
        """Record that `count` more tokens of `sequence` were run; return whether its next token can be sampled.

        Of a decoding sequence only the last token counts: whether its draft is right is not known yet.
        """
        if sequence.phase is Phase.DECODE:
            sequence.computed += 1
            return True
        sequence.computed += count
        self.cache.advance(sequence.slot, sequence.computed)
        if sequence.computed < sequence.prompt_length:
            return False
        self.prefilling.remove(sequence)
        self.decoding.append(sequence)
        sequence.phase = Phase.DECODE
        return True

    def finish(self, sequence: Sequence) -> None:
        """Remove `sequence`, whatever its phase; its slot is free for the next step."""
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        else:
            (self.prefilling if sequence.phase is Phase.PREFILL else self.decoding).remove(sequence)
            self.cache.release(sequence.id, sequence.slot, sequence.prompt_length, sequence.tokens, sequence.computed)
        sequence.phase = Phase.FINISHED

    def check(self) -> None:
        """Raises EngineError unless sequences, phases and slots are consistent."""
        for phase, queue in self.queues.items():
            for sequence in queue:
                missing = len(sequence.tokens) - sequence.computed
                if sequence.phase is not phase or missing < 1 or (phase is Phase.DECODE and missing != 1):
                    raise EngineError(
                        f"{sequence.id!r} is in the queue for {phase.name} as {sequence.phase.name}, "
                        f"{sequence.computed} of {len(sequence.tokens)} tokens computed"
                    )
        at_work = self.prefilling + self.decoding
        owners = {sequence.id: sequence.slot for sequence in at_work}
        if len(owners) < len(at_work):
            raise EngineError(f"a sequence is at work twice: {sorted(sequence.id for sequence in at_work)}")
        self.cache.check(owners)

    def _draft(self, speculation: Speculation) -> None:
        """Give the decoding sequences drafts, of no more tokens than they may still generate but one.

        One with logprobs gets none: those of tokens that are then discarded would take longer than a step.
        """
        agreed = [sequence.lookup.catch_up() for sequence in self.decoding]
        if not any(agreed):
            return
        for sequence, length in zip(self.decoding, speculation.lengths(agreed), strict=True):
            if length and sequence.request.params.logprobs is None:
                new = sequence.request.params.max_new_tokens
                left = min(sequence.prompt_length + new, self.cache.context_length) - len(sequence.tokens)
                sequence.draft = sequence.lookup.draft(min(length, left - 1))

    def _affordable(self, missing: int, budget: int) -> bool:
        """Whether `budget` allows the first chunk of a prompt that lacks `missing` tokens."""
        return budget >= min(missing, self.cache.granularity)

    def _share(self, step: ScheduledStep, sequence: Sequence, budget: int) -> int:
        """Add as much of the rest of a prompt to `step` as `budget` allows; return the number of tokens.

        Every chunk but a prompt's last one is a multiple of the granularity.
        """
        count = missing = sequence.prompt_length - sequence.computed
        if missing > budget:
            count = budget // self.cache.granularity * self.cache.granularity
        if count:
            step.work.append((sequence, count))
        return count

    def _admit(self, step: ScheduledStep, sequence: Sequence, match: Match, now: float) -> None:
        place = self.cache.take(sequence.id, sequence.prompt, match)
        if place.source is not None:
            step.copies.append((place.source, place.slot, place.length))
        sequence.slot = place.slot
        sequence.computed = sequence.cached = place.length
        sequence.admitted = now
        sequence.phase = Phase.PREFILL
        self.prefilling.append(sequence)
