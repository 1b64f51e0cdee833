"""Speculation saves steps where text repeats itself, and never changes what a request gets."""

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcore.config import ModelConfig
from gptcore.engine.engine import Engine
from gptcore.engine.interface import Request
from gptcore.engine.settings import EngineSettings
from gptcore.engine.speculation import LONGEST, MATCH, Lookup, Speculation
from gptcore.errors import ConfigError
from gptcore.model import GPT
from gptcore.package import Package, save_package
from gptcore.sampling import SamplingParams
from gptcore.tokenizer import Tokenizer

from .conftest import CONTEXT, ROWS, SPARE, VOCAB, Answer, FakeRunner, MakeEngine, ScriptedRunner, run

EOT = VOCAB - 1


# Where a sequence repeats itself.


def followed(tokens: Iterable[int]) -> tuple[int, list[int]]:
    """How many of the last tokens agree with those that they follow, and the four likely next."""
    seen: list[int] = []
    lookup = Lookup(seen)
    for token in tokens:
        seen.append(token)
        lookup.catch_up()
    assert lookup.agreed == caught_up(seen).agreed, "token by token and all at once differ"
    return lookup.agreed, lookup.draft(4) if lookup.agreed else []


def caught_up(tokens: list[int]) -> Lookup:
    lookup = Lookup(tokens)
    lookup.catch_up()
    return lookup


def test_a_draft_is_what_followed_the_last_tokens_before() -> None:
    assert followed([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]) == (MATCH, [4, 5, 6, 7])
    assert followed([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4]) == (MATCH + 1, [5, 6, 7, 8])


def test_the_latest_of_several_places_is_followed() -> None:
    assert followed([1, 2, 3, 4, 1, 2, 3, 5, 6, 7, 8, 9, 1, 2, 3]) == (MATCH, [5, 6, 7, 8])


def test_there_is_no_draft_without_a_match_or_after_a_token_that_differs() -> None:
    assert followed([]) == followed([1, 2]) == followed([1, 2, 3]) == followed([1, 2, 3, 4, 5, 6, 2, 3]) == (0, [])
    assert followed([1, 2, 3, 4, 5, 6, 1, 2, 3, 9]) == (0, [])


def test_a_loop_is_continued_past_its_end() -> None:
    assert followed([7, 7, 7, 7]) == (MATCH, [7, 7, 7, 7])
    assert followed([1, 2, 1, 2, 1])[1] == [2, 1, 2, 1]


def test_a_lookup_holds_no_more_places_than_there_are_tokens() -> None:
    lookup = caught_up([*range(100), *range(100)])
    assert len(lookup._places) <= 200


# How long drafts are.


def test_a_draft_grows_with_the_tokens_that_agreed_up_to_a_limit() -> None:
    lengths = [Speculation(row_cost=0.5).lengths([agreed])[0] for agreed in (0, 3, 6, 10, 100)]
    assert lengths == [0, 3, 6, 10, LONGEST]


def test_the_more_sequences_decode_the_more_tokens_must_have_agreed() -> None:
    speculation = Speculation(row_cost=0.5)
    assert speculation.lengths([8, 0]) == [4, 0]
    assert speculation.lengths([8] + [0] * 15) == [0] * 16
    assert speculation.lengths([16] + [0] * 15) == [1] + [0] * 15


@pytest.mark.parametrize("batch", [2, 3, 5, 16])
@pytest.mark.parametrize("cost", [0.02, 0.3, 0.5, 2.0])
def test_drafts_make_a_step_with_several_sequences_at_most_twice_as_long(batch: int, cost: float) -> None:
    lengths = Speculation(cost).lengths([1000] * batch)
    assert sum(lengths) > 0
    assert 1 + cost * (batch + sum(lengths)) <= 2 * (1 + cost * batch)
    assert len(set(lengths)) == 1, "some get more than others"


def test_where_products_are_faster_fewer_tokens_must_have_agreed() -> None:
    agreed = [6] * 8
    assert sum(Speculation.on("native avx2", "").lengths(agreed)) == 0
    assert sum(Speculation.on("native amx-bf16", "").lengths(agreed)) > 8
    assert sum(Speculation.on("native amx-bf16", "int8").lengths(agreed)) == 0


# What a request gets.


class RepeatingRunner(FakeRunner):
    """A runner whose next token nearly always follows from the last one alone, so that its text repeats itself.

    Its states still are a hash of all tokens in the slot, and one in eight decides the next token.
    """

    def follow(self, state: int, token: int, how: int = 0) -> int:
        return super().follow(state >> 9, token, how) << 9 | token

    def logits(self, states: Iterable[int]) -> Tensor:
        rows = [state >> 9 if (state >> 9) % 8 == 0 else (state & 511) * 7 for state in states]
        return self._logits[torch.tensor([row % ROWS for row in rows], dtype=torch.long)] * 3


def requests_of_all_kinds(seed: int, count: int, new: tuple[int, ...] = (1, 2, 7, 40, 100)) -> list[Request]:
    rng = random.Random(seed)
    beginnings = [tuple(rng.randrange(EOT) for _ in range(length)) for length in (0, 20, 48)]
    requests = []
    for i in range(count):
        prompt = rng.choice(beginnings) + tuple(rng.randrange(EOT) for _ in range(rng.choice([1, 2, 31])))
        if requests and rng.random() < 0.3:
            prompt = rng.choice(requests).prompt
        params = SamplingParams(
            seed=rng.randrange(1000),
            max_new_tokens=rng.choice(new),
            temperature=rng.choice([0.0, 0.0, 0.3, 1.0]),
            top_k=rng.choice([0, 0, 20]),
            top_p=rng.choice([1.0, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.05]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.1]),
            stop=rng.choice([(), (), ("a",), (chr(rng.randrange(32, 127)) * 2, "xyz")]),
            stop_token_ids=rng.choice([(), (), tuple(rng.randrange(EOT) for _ in range(3))]),
            logprobs=rng.choice([None, None, 0, 2]),
            ignore_eos=rng.random() < 0.5,
        )
        requests.append(Request(f"{i}", prompt, params, prompt_logprobs=rng.random() < 0.1))
    return requests


def same(one: Answer, other: Answer) -> None:
    assert one.tokens == other.tokens
    assert (one.text, one.reason, one.logprobs) == (other.text, other.reason, other.logprobs)
    assert one.updates[-1].generated_tokens == other.updates[-1].generated_tokens == len(one.tokens)
    assert one.updates[0].prompt_logprobs == other.updates[0].prompt_logprobs


@pytest.mark.parametrize(("slots", "row_cost"), [(1, 0.4), (3, 0.4), (8, 0.02)])
def test_requests_of_all_kinds_get_the_same_with_and_without(
    make_engine: MakeEngine, slots: int, row_cost: float
) -> None:
    """Several at once, with prefixes reused that others have generated, and some aborted on the way."""
    plain = make_engine(RepeatingRunner(slots=1), speculation=False, prefix_cache=False)
    engine = make_engine(RepeatingRunner(slots=slots), prefill_tokens=40, max_queue=300)
    engine._scheduler.speculation = Speculation(row_cost)
    rng = random.Random(slots)
    waiting = requests_of_all_kinds(slots, 60)
    expected = {r.request_id: run(plain, r)[r.request_id] for r in waiting}
    answers: dict[str, Answer] = {}
    aborted = set()
    while waiting or engine.busy:
        for r in [waiting.pop() for _ in range(min(len(waiting), rng.choice([0, 0, 1, 4])))]:
            if r.prompt_logprobs or rng.random() < 0.7 or r.request_id in aborted:
                engine.add(r)
                continue
            # what another has said goes on: its keys and values are reused, and none of a wrong draft's may be
            told = expected[r.request_id].tokens
            if len(told) > 1 and len(r.prompt) + len(told) < CONTEXT:
                longer = replace(r, request_id=f"{r.request_id} and on", prompt=(*r.prompt, *told))
                expected[longer.request_id] = run(plain, longer)[longer.request_id]
                waiting.insert(0, longer)
            engine.add(r)
        if engine.busy and rng.random() < 0.03:
            aborted.add(rng.choice(list(engine._active)))
            engine.abort([*aborted][-1])
        for update in engine.step():
            answers.setdefault(update.request_id, Answer()).put(update)
        engine.check()
    stats = engine.stats()
    assert stats.accepted_tokens_total > 20
    assert stats.draft_tokens_total > stats.accepted_tokens_total
    assert stats.cached_tokens_reused_total > 100
    for name, answer in answers.items():
        if answer.reason == "abort":
            assert answer.tokens == expected[name].tokens[: len(answer.tokens)]
        else:
            same(answer, expected[name])
    updates = [update for answer in answers.values() for update in answer.updates]
    assert sum(update.draft_tokens for update in updates) == stats.draft_tokens_total
    assert sum(update.accepted_tokens for update in updates) == stats.accepted_tokens_total


def say(engine: Engine, **params: Any) -> Answer:
    return run(engine, Request("one", (97,), SamplingParams(temperature=0, **params)))["one"]


def test_text_that_repeats_itself_takes_fewer_steps(make_engine: MakeEngine) -> None:
    engine = make_engine(ScriptedRunner(b"over and over " * 6))
    answer = say(engine, max_new_tokens=100)
    assert answer.text == "over and over " * 6
    assert engine.stats().steps_total < 30
    assert engine.stats().generated_tokens_total == len(answer.tokens) == 85


def test_nothing_after_a_stop_is_told_or_counted(make_engine: MakeEngine) -> None:
    """The stop comes in the middle of a draft that was right."""
    for stop in (dict(stop=("d ov",)), dict(stop_token_ids=(ord("d"),)), dict(max_new_tokens=47)):
        script = b"over an over an over an over an over an over and over an"
        plain = say(make_engine(ScriptedRunner(script), speculation=False), **stop)
        engine = make_engine(ScriptedRunner(script))
        answer = say(engine, **stop)
        same(answer, plain)
        assert engine.stats().generated_tokens_total == len(answer.tokens)
        assert engine.stats().accepted_tokens_total > 5


def test_a_request_with_logprobs_gets_no_drafts(make_engine: MakeEngine) -> None:
    engine = make_engine(ScriptedRunner(b"over and over " * 6))
    answer = say(engine, logprobs=0, max_new_tokens=100)
    assert engine.stats().draft_tokens_total == 0
    assert len(answer.logprobs) == len(answer.tokens) == 85


def test_no_draft_is_computed_past_the_last_token_that_may_be_generated(make_engine: MakeEngine) -> None:
    runner = ScriptedRunner(b"a" * 200)
    answer = say(make_engine(runner), max_new_tokens=10_000)
    assert (len(answer.tokens), answer.reason) == (CONTEXT - 1, "length")
    runner = ScriptedRunner(b"a" * 200)
    say(make_engine(runner), max_new_tokens=9)
    assert max(chunk.start + len(chunk.tokens) for step in runner.steps for chunk in step) == 9


@pytest.mark.parametrize(("invariant", "granularity", "wanted"), [(True, 1, False), (False, 1, True), (True, 16, True)])
def test_there_are_no_drafts_if_unwanted_or_if_chunks_would_change_the_logits(
    make_engine: MakeEngine, invariant: bool, granularity: int, wanted: bool
) -> None:
    engine = make_engine(RepeatingRunner(4, invariant, granularity), speculation=wanted)
    run(engine, *requests_of_all_kinds(1, 10))
    assert engine.stats().draft_tokens_total == 0


def test_a_text_that_does_not_repeat_itself_has_no_drafts(make_engine: MakeEngine) -> None:
    engine = make_engine()
    run(engine, *(replace(r, prompt_logprobs=False) for r in requests_of_all_kinds(2, 40)))
    assert engine.stats().draft_tokens_total < engine.stats().generated_tokens_total / 20


# On the native kernel.


@pytest.fixture(scope="module")
def small_package(
    tmp_path_factory: pytest.TempPathFactory,
    random_model: Callable[[ModelConfig], GPT],
    byte_tokenizer: Tokenizer,
) -> Package:
    """A network with random weights, but for the head: the likeliest token nearly always is the next of twelve."""
    torch.manual_seed(1)
    shape: dict[str, Any] = dict(vocab_size=VOCAB + SPARE, hidden_size=64, num_layers=2, num_heads=4)
    model = random_model(ModelConfig(family="qwen3", context_length=CONTEXT, **shape))
    with torch.no_grad():
        model.embed_tokens.weight *= 100  # or else the layers' part of the sum would be the larger one
        before = [token - 1 if token % 12 else token + 11 for token in range(VOCAB - 5)]
        known = model.embed_tokens.weight[before]
        model.lm_head.weight[: VOCAB - 5] = known / known.norm(dim=1, keepdim=True)
    folder = tmp_path_factory.mktemp("small") / "package"
    return save_package(folder, model.config, model.state_dict(), byte_tokenizer, {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_the_native_kernel_texts_are_the_same_with_and_without(small_package: Package, dtype: str) -> None:
    settings = EngineSettings(slots=4, max_queue=100, backend="native", dtype=dtype, device="cpu", threads=1)
    try:
        plain = Engine(small_package, replace(settings, speculation=False, prefix_cache=False))
    except ConfigError as error:
        pytest.skip(str(error))
    engine = Engine(small_package, settings)
    requests = requests_of_all_kinds(3, 24, new=(40, 100))
    expected = {r.request_id: run(plain, r)[r.request_id] for r in requests}
    answers = run(engine, *requests)
    for name, answer in answers.items():
        same(answer, expected[name])
    assert engine.stats().accepted_tokens_total > 100
    assert engine.stats().steps_total < plain.stats().steps_total
    plain.close()
    engine.close()
