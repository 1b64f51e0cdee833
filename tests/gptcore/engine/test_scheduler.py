"""No slot leaks or is shared, no sequence starves, order is kept, and no decode waits for a prompt."""

import random
from collections.abc import Sequence as Tokens

import pytest

from gptcore.engine.cache import WORTHWHILE, SlotCache
from gptcore.engine.interface import Request
from gptcore.engine.scheduler import ScheduledStep, Scheduler
from gptcore.engine.sequence import Phase, Sequence
from gptcore.errors import EngineError, QueueFull
from gptcore.sampling import SamplingParams

CONTEXT = 160


def make_scheduler(slots: int = 4, prefill: int = 32, queue: int = 64, granularity: int = 1) -> Scheduler:
    return Scheduler(SlotCache(slots, CONTEXT, granularity == 1, granularity), prefill, queue)


def sequence(name: str, prompt: Tokens[int], new: int = 4, prompt_logprobs: bool = False) -> Sequence:
    return Sequence(Request(name, tuple(prompt), SamplingParams(max_new_tokens=new), prompt_logprobs))


def step(scheduler: Scheduler) -> ScheduledStep:
    """Runs one step in which every sampled token is a 9. Finished sequences leave."""
    plan = scheduler.schedule()
    for s, count in plan.work:
        if scheduler.advance(s, count):
            s.tokens.append(9)
            if s.generated == s.request.params.max_new_tokens:
                scheduler.finish(s)
    scheduler.check()
    return plan


def shares(plan: ScheduledStep) -> dict[str, int]:
    return {s.id: count for s, count in plan.work}


def prompt(token: int, length: int) -> list[int]:
    return [token] * length


def test_a_prompt_is_computed_in_chunks_while_others_decode() -> None:
    scheduler = make_scheduler(prefill=32)
    scheduler.add(sequence("short", prompt(1, 5), new=9))
    assert shares(step(scheduler)) == {"short": 5}
    scheduler.add(sequence("long", prompt(2, 80)))
    assert [shares(step(scheduler)) for _ in range(4)] == [
        {"short": 1, "long": 32},
        {"short": 1, "long": 32},
        {"short": 1, "long": 16},
        {"short": 1, "long": 1},
    ]


def test_a_long_prompt_delays_no_decode() -> None:
    scheduler = make_scheduler(slots=8, prefill=16)
    for i in range(4):
        scheduler.add(sequence(f"speaker {i}", prompt(i, 4), new=100))
    step(scheduler)
    for i in range(4):
        scheduler.add(sequence(f"reader {i}", prompt(10 + i, 120), new=1))
    for _ in range(20):
        work = shares(step(scheduler))
        assert all(work[f"speaker {i}"] == 1 for i in range(4))
        assert sum(count for name, count in work.items() if name.startswith("reader")) <= 16


def test_prompts_share_a_step_in_order_of_arrival() -> None:
    scheduler = make_scheduler(slots=4, prefill=32)
    for i, length in enumerate((20, 20, 20)):
        scheduler.add(sequence(f"{i}", prompt(i, length), new=8))
    assert shares(step(scheduler)) == {"0": 20, "1": 12}
    assert shares(step(scheduler)) == {"0": 1, "1": 8, "2": 20}


def test_a_sequence_enters_as_soon_as_a_slot_is_free() -> None:
    scheduler = make_scheduler(slots=1)
    scheduler.add(sequence("first", prompt(1, 4), new=2))
    scheduler.add(sequence("second", prompt(2, 4), new=2))
    assert [shares(step(scheduler)) for _ in range(4)] == [{"first": 4}, {"first": 1}, {"second": 4}, {"second": 1}]


def test_the_time_when_a_sequence_was_admitted_is_recorded() -> None:
    scheduler = make_scheduler(slots=1)
    first, second = sequence("first", prompt(1, 4)), sequence("second", prompt(2, 4))
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule(now=3.5)
    scheduler.finish(first)
    scheduler.schedule(now=7.5)
    assert (first.admitted, second.admitted) == (3.5, 7.5)


def test_the_queue_is_bounded_and_a_free_slot_admits_one_more() -> None:
    scheduler = make_scheduler(slots=2, queue=3)
    for i in range(5):
        scheduler.add(sequence(f"{i}", prompt(i, 4)))
    with pytest.raises(QueueFull, match="5 requests wait for one of 2 slots; no more than 3"):
        scheduler.add(sequence("6", prompt(6, 4)))
    step(scheduler)
    with pytest.raises(QueueFull):
        scheduler.add(sequence("6", prompt(6, 4)))
    scheduler.finish(scheduler.decoding[0])
    scheduler.add(sequence("6", prompt(6, 4)))


@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.PREFILL, Phase.DECODE])
def test_a_sequence_can_be_ended_in_any_phase(phase: Phase) -> None:
    scheduler = make_scheduler(slots=1, prefill=16)
    victim = sequence("victim", prompt(1, 30), new=50)
    scheduler.add(victim)
    steps = {Phase.WAITING: 0, Phase.PREFILL: 1, Phase.DECODE: 3}[phase]
    for _ in range(steps):
        step(scheduler)
    assert victim.phase is phase
    scheduler.finish(victim)
    scheduler.check()
    assert (scheduler.cache.free, len(scheduler.waiting), scheduler.running) == (1, 0, 0)
    scheduler.add(sequence("next", prompt(2, 4)))
    assert shares(step(scheduler)) == {"next": 4}


def test_choices_of_one_prompt_wait_for_the_first_and_copy_it() -> None:
    scheduler = make_scheduler(slots=4, prefill=32)
    choices = [sequence(f"{i}", prompt(1, 60), new=9) for i in range(4)]
    for choice in choices:
        scheduler.add(choice)
    assert shares(step(scheduler)) == {"0": 32}
    assert shares(step(scheduler)) == {"0": 28}
    plan = step(scheduler)
    assert shares(plan) == {"0": 1, "1": 1, "2": 1, "3": 1}
    assert plan.copies == [(0, slot, 59) for slot in (1, 2, 3)]
    assert [choice.cached for choice in choices] == [0, 59, 59, 59]


def test_a_sequence_that_waits_for_an_aborted_prompt_computes_it_itself() -> None:
    scheduler = make_scheduler(slots=4, prefill=16)
    first, second = sequence("first", prompt(1, 60)), sequence("second", prompt(1, 60))
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler)
    assert second.phase is Phase.WAITING
    scheduler.finish(first)
    plan = step(scheduler)
    assert (shares(plan), second.cached, plan.copies) == ({"second": 16}, 16, [])


def test_a_short_common_prefix_is_not_worth_waiting_for() -> None:
    scheduler = make_scheduler(slots=4, prefill=64)
    common = prompt(1, WORTHWHILE - 1)
    scheduler.add(sequence("first", common + prompt(2, 20)))
    scheduler.add(sequence("second", common + prompt(3, 20)))
    assert set(shares(step(scheduler))) == {"first", "second"}


def test_prompt_logprobs_are_computed_from_the_first_token_on() -> None:
    scheduler = make_scheduler(slots=2, prefill=64)
    scheduler.add(sequence("first", prompt(1, 30), new=9))
    step(scheduler)
    scheduler.add(sequence("scored", prompt(1, 30), prompt_logprobs=True))
    assert shares(step(scheduler)) == {"first": 1, "scored": 30}


def test_with_an_alignment_only_the_end_of_a_prompt_is_an_incomplete_chunk() -> None:
    scheduler = make_scheduler(slots=4, prefill=40, granularity=16)  # 48 tokens a step: whole chunks
    for i in range(3):
        scheduler.add(sequence(f"{i}", prompt(i, 55), new=99))
    work = [shares(step(scheduler)) for _ in range(6)]
    assert work[:4] == [{"0": 48}, {"0": 7, "1": 32}, {"0": 1, "1": 23, "2": 16}, {"0": 1, "1": 1, "2": 39}]


def test_the_check_finds_a_sequence_in_the_wrong_queue() -> None:
    scheduler = make_scheduler()
    s = sequence("lost", prompt(1, 4))
    scheduler.add(s)
    step(scheduler)
    s.computed -= 1
    with pytest.raises(EngineError, match="'lost' is in the queue for DECODE as DECODE, 3 of 5 tokens"):
        scheduler.check()


class Crowd:
    """Random arrivals and departures, with separate records that the scheduler's state is compared with."""

    def __init__(self, seed: int, slots: int, prefill: int, granularity: int) -> None:
        self.random = random.Random(seed)
        self.scheduler = make_scheduler(slots, prefill, queue=16, granularity=granularity)
        self.slots, self.granularity = slots, granularity
        self.open: dict[str, Sequence] = {}
        self.order: list[str] = []  # as they came
        self.entered: list[str] = []  # as they were admitted
        self.patience: int | None = None  # steps for which the first in the queue may see a free slot and not enter
        self.held: list[list[int]] = [[] for _ in range(slots)]  # what a runner would have in each slot
        self.arrivals = self.refused = self.finished = self.aborted = self.reused = 0

    def arrive(self) -> None:
        self.arrivals += 1
        name = f"{self.arrivals}"
        begin = prompt(self.random.randrange(4), self.random.choice([0, 20, 40, 70]))
        own = [self.random.randrange(100, 110) for _ in range(self.random.randint(1, 50))]
        s = sequence(name, begin + own, self.random.choice([1, 2, 5, 20]), self.random.random() < 0.05)
        try:
            self.scheduler.add(s)
        except QueueFull:
            self.refused += 1
            return
        self.open[name] = s
        self.order.append(name)

    def abort(self) -> None:
        s = self.open.pop(self.random.choice(list(self.open)))
        if s.phase is Phase.WAITING:
            self.order.remove(s.id)
        self.scheduler.finish(s)
        self.aborted += 1

    def step(self) -> None:
        decoding = {s.id for s in self.open.values() if s.phase is Phase.DECODE}
        waiting = [s.id for s in self.open.values() if s.phase is Phase.WAITING]
        free = self.scheduler.cache.free
        unit = self.granularity if self.granularity > 1 else self.scheduler.prefill_tokens
        left = sum(-(-(s.prompt_length - s.computed) // unit) for s in self.scheduler.prefilling)
        plan = self.scheduler.schedule()
        work = shares(plan)
        assert len(work) == len(plan.work), "a sequence is in a step twice"
        assert decoding <= set(work), "a decode was left out"
        assert sum(n for name, n in work.items() if name not in decoding) <= self.scheduler.prefill_tokens
        if self.open:
            assert work, "nobody runs although somebody could"
        slots = [s.slot for s in self.open.values() if s.phase in (Phase.PREFILL, Phase.DECODE)]
        assert len(slots) == len(set(slots)), "a slot is shared"
        assert len(slots) + self.scheduler.cache.free == self.slots, "a slot has leaked"
        admitted = [name for name in waiting if self.open[name].phase is not Phase.WAITING]
        assert admitted == waiting[: len(admitted)], "somebody was overtaken"
        assert len(admitted) <= free
        self.entered += admitted
        if admitted or not waiting or not free:
            self.patience = None
        else:  # prompts before it take all of the step, or are worth waiting for; these get done
            self.patience = left if self.patience is None else self.patience - 1
            assert self.patience > 0, "the first in the queue starves"
        self._run(plan)
        self.scheduler.check()

    def _run(self, plan: ScheduledStep) -> None:
        """What a runner does, with tokens in place of keys and values."""
        for source, target, length in plan.copies:
            self.held[target][:length] = self.held[source][:length]
        for s, count in plan.work:
            assert self.held[s.slot][: s.computed] == s.tokens[: s.computed], "a slot holds another's tokens"
            assert s.computed % self.granularity == 0 or s.phase is Phase.DECODE, "a chunk begins out of line"
            self.held[s.slot][s.computed :] = s.tokens[s.computed : s.computed + count]
            if not self.scheduler.advance(s, count):
                continue
            self.reused += s.cached if s.generated == 0 else 0
            s.tokens.append(self.random.randrange(100, 110))
            if s.generated == s.request.params.max_new_tokens:
                self.scheduler.finish(self.open.pop(s.id))
                self.finished += 1


@pytest.mark.parametrize(
    ("slots", "prefill", "granularity"), [(1, 8, 1), (4, 32, 1), (16, 256, 1), (4, 32, 16), (8, 16, 32)]
)
def test_in_a_long_random_run_no_slot_leaks_or_is_shared_and_no_sequence_starves(
    slots: int, prefill: int, granularity: int
) -> None:
    crowd = Crowd(slots * 1000 + granularity, slots, prefill, granularity)
    for burst in range(400):
        for _ in range(crowd.random.choice([0, 0, 1, 3, 10, 3 * slots])):
            crowd.arrive()
        for _ in range(crowd.random.randint(1, 12)):
            if crowd.open and crowd.random.random() < 0.05:
                crowd.abort()
            crowd.step()
        if burst % 50 == 49:  # a pause: everybody gets through, in a number of steps that the work left bounds
            left = sum(len(s.tokens) - s.computed + 20 for s in crowd.open.values())
            steps = 0
            while crowd.open:
                crowd.step()
                steps += 1
                assert steps <= left, "somebody starves"
            assert crowd.scheduler.cache.free == slots
    assert crowd.entered == crowd.order, "not in the order they came"
    assert min(crowd.finished, crowd.aborted, crowd.refused, crowd.reused) > 10
