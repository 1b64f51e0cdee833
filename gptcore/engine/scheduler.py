"""Who runs in the next step, and how far: plain Python, with no model in sight.

Requests go in at one end, and a `ScheduledStep` comes out per step. Every sequence that decodes is in every step. Beside them,
at most `prefill_tokens` of prompts are computed, the earliest admitted first, so that a long prompt takes several steps
and no decode waits for it. Admission is first come, first served: a request enters when there is a free slot and the
step has prompt tokens left for it. It lets a step pass, and so do those behind it, when a prompt now being computed
begins like its own; then it can copy the beginning. That prompt grows with every step, so this wait has an end.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from gptcore.engine.cache import WORTHWHILE, Match, SlotCache
from gptcore.engine.sequence import Phase, Sequence
from gptcore.errors import EngineError, QueueFull


@dataclass(frozen=True)
class ScheduledStep:
    """What one step does: first `copies` (source slot, target slot, positions), in order, then `work`.

    `work` has each sequence with the number of its tokens to run, from `computed` on; decodes come first.
    """

    work: list[tuple[Sequence, int]]
    copies: list[tuple[int, int, int]] = field(default_factory=list)


class Scheduler:
    """The queue, the sequences at work, and the rules by which one becomes the other."""

    def __init__(self, cache: SlotCache, prefill_tokens: int, max_queue: int) -> None:
        g = cache.granularity
        self.cache = cache
        self.max_queue = max_queue
        self.prefill_tokens = -(-prefill_tokens // g) * g  # whole chunks, or a prompt might never get on
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
        """Puts `sequence` into the queue. Raises QueueFull if as many wait as may; a free slot is room for one more."""
        if len(self.waiting) >= self.max_queue + self.cache.free:
            raise QueueFull(
                f"{len(self.waiting)} requests wait for one of {self.cache.slots} slots; no more than {self.max_queue} "
                "may. Try again later"
            )
        self.waiting.append(sequence)

    def schedule(self, now: float = 0.0) -> ScheduledStep:
        """The next step. Sequences admitted by it get their slot, and `now` as the time they were admitted."""
        step = ScheduledStep([(sequence, 1) for sequence in self.decoding])
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
        """`count` more tokens of `sequence` were run. Returns whether its next token can be sampled."""
        sequence.computed += count
        if sequence.phase is Phase.DECODE:
            return True
        self.cache.advance(sequence.slot, sequence.computed)
        if sequence.computed < sequence.prompt_length:
            return False
        self.prefilling.remove(sequence)
        self.decoding.append(sequence)
        sequence.phase = Phase.DECODE
        return True

    def finish(self, sequence: Sequence) -> None:
        """Takes `sequence` out, wherever it is; its slot is free for the next step."""
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        else:
            (self.prefilling if sequence.phase is Phase.PREFILL else self.decoding).remove(sequence)
            self.cache.release(sequence.id, sequence.slot, sequence.prompt_length, sequence.tokens, sequence.computed)
        sequence.phase = Phase.FINISHED

    def check(self) -> None:
        """Raises EngineError unless sequences, phases and slots agree."""
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

    def _affordable(self, missing: int, budget: int) -> bool:
        """Whether `budget` allows the first chunk of a prompt of which `missing` tokens are to be computed."""
        return budget >= min(missing, self.cache.granularity)

    def _share(self, step: ScheduledStep, sequence: Sequence, budget: int) -> int:
        """Puts what `budget` allows of the rest of a prompt into `step`; returns the number of tokens.

        Where chunks have an alignment, only the end of the prompt is an incomplete one.
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
