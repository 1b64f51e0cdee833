"""The same seed and prompt give the same text: alone, in a batch, with a reused prefix, and after a reload."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from gptcore.config import ModelConfig
from gptcore.engine.engine import Engine
from gptcore.engine.interface import FinishReason, Request
from gptcore.engine.settings import EngineSettings
from gptcore.errors import ConfigError, QueueFull
from gptcore.model import GPT
from gptcore.package import Package, save_package
from gptcore.sampling import SamplingParams
from gptcore.tokenizer import Tokenizer

from .conftest import SPARE, VOCAB, Answer, FakeRunner, MakeEngine, alone, run

EOT = VOCAB - 1


def crowd(seed: int, count: int, scale: int = 1) -> list[Request]:
    """Requests with prompts that begin alike, some of them the same, and parameters of all kinds."""
    rng = random.Random(seed)
    beginnings = [tuple(rng.randrange(EOT) for _ in range(length * scale)) for length in (0, 32, 64, 90)]
    requests = []
    for i in range(count):
        prompt = rng.choice(beginnings) + tuple(rng.randrange(EOT) for _ in range(rng.choice([1, 2, 8, 31])))
        if requests and rng.random() < 0.2:
            prompt = rng.choice(requests).prompt
        params = SamplingParams(
            seed=rng.randrange(1000),
            max_new_tokens=rng.choice([1, 3, 10, 20]),
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_k=rng.choice([0, 0, 20]),
            top_p=rng.choice([1.0, 0.9]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            logprobs=rng.choice([None, 0, 2]),
        )
        requests.append(Request(f"{i}", prompt, params))
    return requests


def same_alone_and_together(lonely: Engine, crowded: Engine, requests: list[Request]) -> None:
    """Runs every request alone, then all of them in groups of 16, some of which arrive while others run."""
    expected = {r.request_id: run(lonely, r)[r.request_id] for r in requests}
    answers: dict[str, Answer] = {}
    for begin in range(0, len(requests), 16):
        group = requests[begin : begin + 16]
        for r in group[:10]:
            crowded.add(r)
        late = group[10:]
        while crowded.busy or late:
            if late:
                crowded.add(late.pop())
            for update in crowded.step():
                answers.setdefault(update.request_id, Answer()).put(update)
    crowded.check()
    for r in requests:
        one, other = expected[r.request_id], answers[r.request_id]
        assert one.tokens == other.tokens, f"request {r.request_id} differs"
        assert (one.text, one.reason, one.logprobs) == (other.text, other.reason, other.logprobs)
    assert crowded.stats().cached_tokens_reused_total > 0
    assert crowded.stats().steps_total < lonely.stats().steps_total


@pytest.mark.parametrize(("invariant", "granularity"), [(True, 1), (False, 16), (False, 32)])
def test_the_same_seed_and_prompt_give_the_same_text_alone_and_in_a_batch(
    make_engine: MakeEngine, invariant: bool, granularity: int
) -> None:
    lonely = make_engine(FakeRunner(16, invariant, granularity), prefix_cache=False)
    crowded = make_engine(FakeRunner(16, invariant, granularity), prefill_tokens=48)
    same_alone_and_together(lonely, crowded, crowd(1, 200))


@pytest.fixture(scope="module", params=["gpt2", "qwen3"])
def small_package(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    random_model: Callable[[ModelConfig], GPT],
    byte_tokenizer: Tokenizer,
) -> Package:
    """A network with random weights, long enough for prompts of several chunks."""
    shape: dict[str, Any] = dict(vocab_size=VOCAB + SPARE, hidden_size=64, num_layers=2, num_heads=4)
    if request.param == "qwen3":
        shape |= dict(num_kv_heads=2, head_dim=32)
    torch.manual_seed(1)
    model = random_model(ModelConfig(family=request.param, context_length=256, **shape))
    folder = tmp_path_factory.mktemp("small") / request.param
    return save_package(folder, model.config, model.state_dict(), byte_tokenizer, {})


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param("torch", "float32", marks=pytest.mark.slow),
        ("native", "float32"),
        ("native", "bfloat16"),
    ],
)
def test_on_real_runners_200_prompts_give_the_same_text_alone_in_a_batch_and_after_a_reload(
    small_package: Package, backend: str, dtype: str
) -> None:
    settings = EngineSettings(slots=16, prefill_tokens=96, backend=backend, dtype=dtype, device="cpu", threads=1)
    try:
        lonely, crowded = (Engine(small_package, replace(settings, prefix_cache=cache)) for cache in (False, True))
    except ConfigError as error:
        if error.param != "backend":
            raise
        pytest.skip(str(error))
    assert lonely.info.runner.startswith(backend)
    same_alone_and_together(lonely, crowded, crowd(3, 200, scale=2))
    lonely.close()
    crowded.close()


def test_prompt_logprobs_do_not_change_other_sequences(make_engine: MakeEngine) -> None:
    scored = [replace(r, prompt_logprobs=i % 3 == 0) for i, r in enumerate(crowd(4, 30))]
    engine = make_engine(prefix_cache=False)
    expected = {r.request_id: run(engine, replace(r, prompt_logprobs=False))[r.request_id].tokens for r in scored}
    answers = run(make_engine(FakeRunner(16), prefill_tokens=32), *scored)
    assert {name: answer.tokens for name, answer in answers.items()} == expected


def test_in_a_long_random_run_every_text_equals_the_one_alone_and_no_slot_is_lost(make_engine: MakeEngine) -> None:
    """Thousands of steps with arrivals at any of them, aborts in every phase, and a queue that overflows."""
    rng = random.Random(5)
    runner = FakeRunner(slots=6)
    engine = make_engine(runner, prefill_tokens=40, max_queue=12)
    waiting = [replace(r, params=replace(r.params, logprobs=None)) for r in crowd(2, 800)]
    requests = {r.request_id: r for r in waiting}
    answers: dict[str, Answer] = {}
    aborted, refused = set(), 0
    while waiting or engine.busy:
        for _ in range(rng.choice([0, 0, 0, 1, 2, 25])):
            try:
                if waiting:
                    engine.add(waiting[-1])
                    waiting.pop()
            except QueueFull:
                refused += 1
        if engine.busy and rng.random() < 0.1:
            name = rng.choice(list(engine._active))
            engine.abort(name)
            aborted.add(name)
        for update in engine.step():
            answers.setdefault(update.request_id, Answer()).put(update)
        engine.check()
    assert engine.stats().slots_used == 0
    assert refused > 10
    ended = [name for name in requests if answers[name].reason is FinishReason.ABORT]
    assert set(ended) <= aborted
    assert len(ended) > 10
    for name, r in requests.items():
        told, expected = answers[name].tokens, alone(runner, r.prompt, r.params)
        assert told == (expected[: len(told)] if name in ended else expected)
