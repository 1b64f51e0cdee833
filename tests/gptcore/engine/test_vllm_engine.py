"""vLLM behind our interface, with a stand-in for vLLM: what it is asked, and what becomes of its answers.

tests/system/test_vllm.py runs the real one.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptcore.config import ModelConfig
from gptcore.engine import AsyncEngine, EngineInfo, EngineSettings, FinishReason, Request
from gptcore.engine import vllm_engine as tested
from gptcore.engine.continuation import Continuation
from gptcore.engine.vllm_engine import VllmEngine, engine_arguments, parameters, to_choice
from gptcore.errors import ConfigError, EngineError, QueueFull
from gptcore.model import GPT
from gptcore.package import Package, open_package, save_package
from gptcore.sampling import SamplingParams
from gptcore.tokenizer import Tokenizer
from tests.waiting import until

from .conftest import CONTEXT, VOCAB, run

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, max_new_tokens=32)


class FakeVllm:
    """Says the bytes of `script`, then <|endoftext|>, to everyone; `rows` tokens in each output."""

    def __init__(self, script: bytes = b"one, two, three", rows: int = 1) -> None:
        self.script, self.rows = [*script, VOCAB - 1], rows
        self.errored = self.shut = False
        self.asked: dict[str, dict[str, Any]] = {}
        self.left: list[str] = []
        """Requests whose reader left before they had ended."""
        self.holds = False
        """Whether it says nothing more for now."""
        self.error: Exception | None = None
        self.deadly = False
        """Whether the error is the end of its processes."""
        self.logprob = -1.0

    async def generate(self, prompt: dict[str, Any], params: dict[str, Any], name: str) -> AsyncIterator[Any]:
        self.asked[name] = params | prompt
        try:
            for begin in range(0, min(len(self.script), params["max_tokens"]), self.rows):
                await asyncio.sleep(0)
                while self.holds:
                    await asyncio.sleep(0.001)
                if self.error is not None:
                    self.errored = self.deadly
                    raise self.error
                tokens = self.script[begin : begin + self.rows]
                yield self.output(params, prompt["prompt_token_ids"], tokens, begin)
        except (asyncio.CancelledError, GeneratorExit):
            self.left.append(name)
            raise

    def output(self, params: dict[str, Any], prompt: Sequence[int], tokens: Sequence[int], begin: int) -> Any:
        def entry(token: int) -> dict[int, Any]:
            return {token: SimpleNamespace(logprob=self.logprob, rank=2), 7: SimpleNamespace(logprob=-0.5, rank=1)}

        prompt_logprobs = [None, *map(entry, prompt[1:])] if params["prompt_logprobs"] is not None else None
        return SimpleNamespace(
            outputs=[SimpleNamespace(token_ids=tokens, logprobs=[entry(token) for token in tokens])],
            prompt_logprobs=prompt_logprobs if begin == 0 else [],
            finished=begin + len(tokens) >= params["max_tokens"] or tokens[-1] in params["stop_token_ids"],
            num_cached_tokens=min(1, len(prompt) - 1),
            metrics=SimpleNamespace(queued_ts=10.0, scheduled_ts=10.25),
        )

    def shutdown(self) -> None:
        self.shut = True


@pytest.fixture
def plain_package(byte_tokenizer: Tokenizer) -> Package:
    """A package without spare rows, and without files."""
    return Package(Path("plain"), ModelConfig(vocab_size=VOCAB, context_length=CONTEXT), byte_tokenizer, {})


Make = Callable[..., VllmEngine]


@pytest.fixture
def make(plain_package: Package, monkeypatch: pytest.MonkeyPatch) -> Make:
    """An engine on a stand-in for vLLM."""
    monkeypatch.setattr(tested, "to_vllm", parameters)

    def engine(vllm: FakeVllm, slots: int = 4, **settings: Any) -> VllmEngine:
        async def start(*_: Any) -> tuple[FakeVllm, EngineInfo]:
            return vllm, EngineInfo("fake vLLM", "", "float32", "cpu", slots, CONTEXT, 0, False)

        return VllmEngine(plain_package, EngineSettings(engine="vllm", **settings), start)

    return engine


def asked(params: SamplingParams, tokenizer: Tokenizer, prompt: Sequence[int] = (1, 2), **how: bool) -> dict[str, Any]:
    request = Request("one", tuple(prompt), params, **how)
    return parameters(request, Continuation(request, tokenizer, CONTEXT))


def test_vllm_gets_our_parameters_under_its_names(byte_tokenizer: Tokenizer) -> None:
    params = SamplingParams(
        max_new_tokens=9,
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        seed=3,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        stop=("never sent",),
        stop_token_ids=(65,),
        logprobs=2,
    )
    assert asked(params, byte_tokenizer, prompt_logprobs=True) == {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 3,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "max_tokens": 9,
        "stop_token_ids": [65, VOCAB - 1],
        "ignore_eos": True,
        "logprobs": 2,
        "prompt_logprobs": 2,
        "detokenize": False,
    }


@pytest.mark.parametrize(
    ("params", "name", "value"),
    [
        ({"top_k": 1, "temperature": 2.0}, "temperature", 0.0),
        ({"ignore_eos": True}, "stop_token_ids", []),
        ({"ignore_eos": True, "stop_token_ids": (5, 4)}, "stop_token_ids", [4, 5]),
        ({"seed": -1}, "seed", 2**63 - 1),  # -1 means no seed to vLLM
        ({"seed": 2**64 + 5}, "seed", 5),
        ({"seed": None}, "seed", None),
        ({"max_new_tokens": 10_000}, "max_tokens", CONTEXT - 2),
        ({}, "prompt_logprobs", None),
    ],
)
def test_what_differs_in_vllm_is_translated(
    byte_tokenizer: Tokenizer, params: dict[str, Any], name: str, value: Any
) -> None:
    assert asked(SamplingParams(**params), byte_tokenizer)[name] == value


def test_a_prompt_that_is_only_scored_generates_one_token_which_is_dropped(make: Make) -> None:
    vllm = FakeVllm()
    engine = make(vllm)
    answer = run(engine, Request("one", (5, 6, 8), GREEDY, prompt_logprobs=True, prompt_only=True))["one"]
    assert vllm.asked["one"]["max_tokens"] == 1
    assert (answer.tokens, answer.text, answer.reason) == ([], "", FinishReason.LENGTH)
    [update] = answer.updates
    assert [(entry.token_id, entry.logprob) for entry in update.prompt_logprobs] == [(5, None), (6, -1.0), (8, -1.0)]
    engine.close()


@pytest.mark.parametrize("rows", [1, 4, 99])
def test_text_stop_strings_and_ends_are_ours_however_tokens_are_batched(make: Make, rows: int) -> None:
    engine = make(FakeVllm(rows=rows))
    answers = run(
        engine,
        Request("whole", (1,), GREEDY),
        Request("stop", (1,), replace(GREEDY, stop=("two",))),
        Request("token", (1,), replace(GREEDY, stop_token_ids=(ord("w"),))),
        Request("length", (1,), replace(GREEDY, max_new_tokens=5)),
    )
    found = {name: (answer.text, answer.reason, len(answer.tokens)) for name, answer in answers.items()}
    assert found == {
        "whole": ("one, two, three", FinishReason.STOP, 16),
        "stop": ("one, ", FinishReason.STOP, 8),
        "token": ("one, t", FinishReason.STOP, 7),
        "length": ("one, ", FinishReason.LENGTH, 5),
    }
    assert not engine.busy
    assert (engine.stats().generated_tokens_total, engine.stats().prompt_tokens_total) == (36, 4)
    engine.close()


def test_a_sequence_that_ended_here_is_ended_in_vllm(make: Make) -> None:
    vllm = FakeVllm()
    engine = make(vllm)
    run(engine, Request("stop", (1,), replace(GREEDY, stop=("two",))))
    assert vllm.left == ["stop"]
    engine.close()
    assert vllm.shut


def test_updates_have_logprobs_cached_tokens_and_the_wait(make: Make) -> None:
    engine = make(FakeVllm(b"a"))
    answer = run(engine, Request("one", (5, 6), replace(GREEDY, logprobs=1)))["one"]
    first = answer.updates[0]
    assert (first.prompt_tokens, first.cached_tokens, first.queue_seconds) == (2, 1, 0.25)
    assert [(e.text, e.bytes, e.logprob) for e in answer.logprobs] == [("a", (97,), -1.0), ("<|endoftext|>", (), -1.0)]
    assert [(other.token_id, other.logprob) for other in answer.logprobs[0].top] == [(7, -0.5)]
    engine.close()


def test_the_likeliest_tokens_come_by_rank_and_as_many_as_requested() -> None:
    known = {token: SimpleNamespace(logprob=-float(rank), rank=rank) for token, rank in ((9, 40), (4, 2), (3, 1))}
    assert to_choice(9, known, 2).top == ((3, -1.0), (4, -2.0))
    assert to_choice(9, known, 0).top == ()
    assert to_choice(9, None, 2).logprob is None


def test_an_aborted_request_ends_at_the_next_step(make: Make) -> None:
    vllm = FakeVllm()
    engine = make(vllm)
    vllm.holds = True
    engine.add(Request("one", (1,), GREEDY))
    assert engine.step() == []  # it waits a moment only
    engine.abort("one")
    engine.abort("unknown")
    [update] = engine.step()
    assert (update.finish_reason, engine.busy, vllm.left) == (FinishReason.ABORT, False, ["one"])
    engine.close()


@pytest.mark.parametrize(
    ("request_", "param", "message"),
    [
        (Request("one", (), GREEDY), "prompt", "empty"),
        (Request("one", (1,) * CONTEXT, GREEDY, prompt_only=True), "prompt", f"at most {CONTEXT - 1} fit"),
        (Request("one", (VOCAB,), GREEDY), "prompt", f"token id {VOCAB}"),
        (Request("one", (1,), SamplingParams(temperature=2.5)), "temperature", "is 2.5; with vLLM, at most 2"),
        (Request("one", (1,), replace(GREEDY, stop_token_ids=(999,))), "stop_token_ids", "token id 999"),
    ],
)
def test_what_cannot_be_run_is_refused_before_vllm_sees_it(
    make: Make, request_: Request, param: str, message: str
) -> None:
    vllm = FakeVllm()
    engine = make(vllm)
    with pytest.raises(ConfigError, match=message) as caught:
        engine.add(request_)
    assert caught.value.param == param
    assert not vllm.asked
    engine.close()


def test_more_than_slots_and_queue_hold_are_refused(make: Make) -> None:
    engine = make(FakeVllm(), slots=1, max_queue=1)
    engine.add(Request("one", (1,), GREEDY))
    engine.add(Request("two", (1,), GREEDY))
    with pytest.raises(QueueFull):
        engine.add(Request("three", (1,), GREEDY))
    with pytest.raises(ConfigError, match="in use"):
        engine.add(Request("two", (1,), GREEDY))
    engine.close()


def test_a_model_whose_logprobs_are_not_finite_fails_its_warm_up(make: Make) -> None:
    vllm = FakeVllm()
    engine = make(vllm)
    engine.warm_up()
    assert engine.stats().generated_tokens_total == 0
    vllm.logprob = math.nan
    with pytest.raises(EngineError, match="not finite"):
        engine.warm_up()
    vllm.logprob, vllm.error = -1.0, ValueError("no such kernel")
    with pytest.raises(EngineError, match="cannot run the model"):
        engine.warm_up()
    engine.close()


def test_when_vllm_dies_readers_are_told_and_the_engine_is_closed(make: Make) -> None:
    async def main() -> None:
        vllm = FakeVllm()
        served = AsyncEngine(lambda: make(vllm))
        await served.start()
        assert served.alive
        vllm.error, vllm.deadly = RuntimeError("killed"), True
        stream = served.generate(Request("one", (1,), GREEDY))
        updates = [update async for update in stream]
        assert updates[-1].finish_reason is FinishReason.ERROR
        await until(lambda: not served.at_work)
        assert not served.alive
        assert vllm.shut
        with pytest.raises(EngineError, match="killed"):
            served.generate(Request("two", (1,), GREEDY))

    asyncio.run(main())


def test_a_request_that_vllm_cannot_run_fails_alone(make: Make) -> None:
    vllm = FakeVllm()
    engine = make(vllm)
    vllm.error = RuntimeError("a bug")
    assert run(engine, Request("one", (1,), GREEDY))["one"].reason is FinishReason.ERROR
    vllm.error = None
    assert run(engine, Request("two", (1,), GREEDY))["two"].text == "one, two, three"
    engine.close()


def test_what_vllm_refuses_is_the_callers_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("temperature is too odd")

    engine = make(FakeVllm())
    monkeypatch.setattr(tested, "to_vllm", refuse)
    with pytest.raises(ConfigError, match="vLLM refuses the request: temperature is too odd"):
        engine.add(Request("one", (1,), GREEDY))
    engine.close()


def test_an_idle_engine_whose_processes_died_is_not_alive(make: Make) -> None:
    async def main() -> None:
        vllm = FakeVllm()
        served = AsyncEngine(lambda: make(vllm))
        await served.start()
        vllm.errored = True
        assert not served.alive
        with pytest.raises(EngineError, match="has died"):
            served.generate(Request("one", (1,), GREEDY))
        await served.close()

    asyncio.run(main())


def test_the_cache_holds_every_slot_in_whole_blocks(plain_package: Package) -> None:
    settings = EngineSettings(engine="vllm", slots=3, dtype="float32", prefill_tokens=40)
    dtype, slots, arguments = engine_arguments(plain_package, settings, CPU)
    c = plain_package.config
    token = 2 * c.num_layers * c.kv_heads * c.head_size * 4
    assert (dtype, slots) == (torch.float32, 3)
    assert arguments["kv_cache_memory_bytes"] == (3 * CONTEXT + tested.CPU_BLOCK) * token
    assert (arguments["max_num_seqs"], arguments["max_num_batched_tokens"]) == (3, CONTEXT + 3)  # whole prompts
    assert arguments["max_model_len"] == CONTEXT
    assert "gpu_memory_utilization" not in arguments


def test_a_gpu_gets_its_share_of_memory_and_prompts_in_parts(plain_package: Package) -> None:
    settings = EngineSettings(engine="vllm", dtype="bfloat16", prefill_tokens=40, gpu_share=0.3, tensor_parallel=2)
    dtype, slots, arguments = engine_arguments(plain_package, settings, torch.device("cuda"))
    assert (dtype, slots) == (torch.bfloat16, tested.GPU_SLOTS)
    assert arguments["gpu_memory_utilization"] == 0.3
    assert (arguments["tensor_parallel_size"], arguments["max_num_batched_tokens"]) == (2, 40 + slots)
    assert arguments["distributed_executor_backend"] == "mp"


def test_a_device_that_vllm_was_not_built_for_is_refused(plain_package: Package) -> None:
    with pytest.raises(ConfigError, match="device is 'cuda:1'; expected auto or cpu") as caught:
        engine_arguments(plain_package, EngineSettings(engine="vllm", device="cuda:1"), CPU)
    assert caught.value.param == "device"


def test_without_vllm_the_error_says_how_to_get_it(plain_package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"make \.venv-vllm/installed"):
        VllmEngine(plain_package, EngineSettings(engine="vllm"))


@pytest.mark.parametrize("tied", [True, False])
def test_rows_behind_the_vocabulary_are_left_out_of_what_vllm_reads(
    byte_tokenizer: Tokenizer, tmp_path: Path, tied: bool
) -> None:
    shape = dict(hidden_size=32, num_layers=1, num_heads=2, context_length=16, tie_embeddings=tied)
    state = GPT(ModelConfig(vocab_size=VOCAB + 7, **shape)).state_dict()  # type: ignore[arg-type]
    config = ModelConfig(vocab_size=VOCAB + 7, **shape)  # type: ignore[arg-type]
    package = save_package(tmp_path / "model", config, state, byte_tokenizer, {})
    ids = torch.tensor([[1, 2, 3]])
    with tested._without_spare_rows(package, torch.float32) as folder, torch.inference_mode():
        smaller = open_package(folder)
        assert smaller.config.vocab_size == VOCAB
        torch.testing.assert_close(smaller.load_model()(ids), package.load_model()(ids)[..., :VOCAB])
    assert not folder.exists()
