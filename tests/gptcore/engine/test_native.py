"""The native kernel computes the same as the model, for every kind of processor, and is deterministic."""

import platform
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

from gptcore.config import ModelConfig, RopeScaling
from gptcore.engine import native
from gptcore.engine.interface import Chunk
from gptcore.engine.native import NativeRunner, NativeUnavailable
from gptcore.model import GPT
from gptcore.sampling import SamplingParams, SamplingState, next_tokens, uniform
from tests.sampling import PARAMS, VALUES, by_definition

GPT2 = ModelConfig(vocab_size=257, family="gpt2", num_layers=2, num_heads=2, hidden_size=64, context_length=96)
QWEN3 = ModelConfig(
    vocab_size=300,
    family="qwen3",
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    hidden_size=80,
    head_dim=32,
    context_length=96,
)
QWEN2 = replace(QWEN3, family="qwen2", num_kv_heads=1)
LLAMA = replace(QWEN3, family="llama", head_dim=64, rope_scaling=RopeScaling("llama3", factor=8.0, original_context=24))
CONFIGS = pytest.mark.parametrize("config", [GPT2, QWEN3, QWEN2, LLAMA], ids=["gpt2", "qwen3", "qwen2", "llama"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
VARIANTS = {
    "as built": (),
    "without AMX": ("-mno-amx-bf16",),
    "without bf16": ("-mno-amx-bf16", "-mno-avx512bf16"),
    "AVX2": ("-march=haswell",),
}

DRAWS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, **penalties)
    for temperature in (0.0, 1e-40, 0.7, 1.0, 40.0)
    for top_k in (0, 1, 3, 200)
    for top_p in (1.0, 0.9, 0.3, 1e-9)
    for min_p in (0.0, 0.05, 1.0)
    for penalties in ({}, {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": -1.0})
]

try:
    native.load_library(torch.float32)
except NativeUnavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernel, compiled for an older processor than this one."""
    yield from compiled_with(VARIANTS[request.param], request.param, monkeypatch)


def compiled_with(flags: tuple[str, ...], name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Within a fixture, the kernel is compiled with these flags."""
    if flags and platform.machine() != "x86_64":
        pytest.skip("these variants are of x86-64")
    monkeypatch.setattr(native, "EXTRA_FLAGS", flags)
    native.load_library.cache_clear()
    yield name
    native.load_library.cache_clear()


def random_model(config: ModelConfig) -> GPT:
    torch.manual_seed(1)
    model = GPT(config).eval()
    for parameter in model.parameters():  # the head and the gains too, which start at 0 and 1
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def some_tokens(config: ModelConfig, sequences: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(config.vocab_size, (sequences, length), generator=generator).tolist()


def native_runner(model: GPT, slots: int, dtype: torch.dtype, threads: int = 0) -> NativeRunner:
    return NativeRunner(model.config, model.named_parameters(), slots, dtype, threads)


def at_once(runner: NativeRunner, slot: int, tokens: list[int]) -> Tensor:
    return runner.forward([Chunk(slot, 0, tokens, len(tokens))]).clone()


@CONFIGS
def test_logits_equal_those_of_the_model_in_every_variant(config: ModelConfig, variant: str) -> None:
    model, (tokens,) = random_model(config), some_tokens(config, 1, 70)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens]))[0]
    logits = at_once(native_runner(model, 2, torch.float32, 2), 1, tokens)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    rounded = at_once(native_runner(model, 2, torch.bfloat16, 2), 1, tokens)
    assert (rounded - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("head_dim", [16, 48, 80, 96, 112, 128, 160, 192, 256])
def test_heads_of_every_published_width_give_the_models_logits(head_dim: int) -> None:
    model, (tokens,) = random_model(replace(QWEN3, head_dim=head_dim, num_layers=1)), some_tokens(QWEN3, 1, 40)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens]))[0]
    logits = at_once(native_runner(model, 2, torch.float32, 2), 1, tokens)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@CONFIGS
@DTYPES
def test_logits_are_bit_identical_however_tokens_are_batched(
    config: ModelConfig, dtype: torch.dtype, variant: str
) -> None:
    model, texts = random_model(config), some_tokens(config, 17, 60)
    alone = [at_once(native_runner(model, 1, dtype, 1), 0, tokens) for tokens in texts]
    crowd = native_runner(model, 17, dtype, 2)
    cuts = [5 + 3 * n % 40 for n in range(17)]  # every sequence is somewhere else
    crowd.forward([Chunk(n, 0, tokens[: cuts[n]], 0) for n, tokens in enumerate(texts)])
    for step in range(10):
        places = [cuts[n] + step for n in range(17)]
        logits = crowd.forward([Chunk(n, places[n], texts[n][places[n] : places[n] + 1], 1) for n in range(17)])
        for n in range(17):
            assert torch.equal(logits[n], alone[n][places[n]])


@CONFIGS
@DTYPES
def test_a_copied_prefix_gives_the_same_logits_as_a_computed_one(config: ModelConfig, dtype: torch.dtype) -> None:
    model, (tokens,) = random_model(config), some_tokens(config, 1, 60)
    runner = native_runner(model, 3, dtype, 2)
    expected = at_once(runner, 0, tokens)
    at_once(runner, 2, list(reversed(tokens)))  # what the slot held before does not matter
    runner.copy(0, 2, 37)
    assert torch.equal(runner.forward([Chunk(2, 37, tokens[37:], 23)]), expected[37:])


def test_only_requested_rows_are_returned_in_the_order_of_the_chunks() -> None:
    model, (one, two) = random_model(GPT2), some_tokens(GPT2, 2, 20)
    runner = native_runner(model, 3, torch.float32, 2)
    first, second = at_once(runner, 0, one), at_once(runner, 1, two)
    logits = runner.forward([Chunk(1, 0, two, 1), Chunk(2, 0, one[:9], 0), Chunk(0, 0, one, 4)])
    assert torch.equal(logits, torch.cat([second[-1:], first[-4:]]))


@pytest.mark.parametrize("vocab_size", [257, 5000])
def test_tokens_are_drawn_as_sampling_defines_in_every_variant(vocab_size: int, variant: str) -> None:
    runner = native_runner(random_model(GPT2), 1, torch.float32, 2)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(len(DRAWS), vocab_size + 7, generator=generator)[:, :vocab_size] * 3
    logits[::3] = (logits[::3] * 2).round() / 2  # with many that are equally likely
    rows = [SamplingState(params, seed, [5, 9, 9, seed % 200, 5], 2) for seed, params in enumerate(DRAWS)]
    expected = next_tokens(logits, rows)
    assert runner.next_tokens(logits, rows) == expected
    assert [runner.next_tokens(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)] == expected


@pytest.fixture(scope="module")
def sampler() -> NativeRunner:
    return native_runner(random_model(GPT2), 1, torch.float32, 1)


@given(VALUES, PARAMS)
@example([0.0, 0.0, 2.28e-38], SamplingParams(top_k=2))
@example([0.0, 0.0, 1.4e-45], SamplingParams(top_p=0.5))
@example([1.0, 2.0, 3.0], SamplingParams(top_k=2, temperature=1e30))
@example([0.0, 0.0], SamplingParams(temperature=5e-324))
@example([0.0, 1.0, 2.0], SamplingParams(top_k=2**32 + 1))
def test_the_kernels_filters_keep_what_the_definition_keeps(
    sampler: NativeRunner, values: list[float], params: SamplingParams
) -> None:
    logits = torch.tensor(values)
    kept = by_definition(logits, params)
    rows = [SamplingState(params, seed, [0], 1) for seed in range(50)]
    points = [uniform(seed, 1) for seed in range(50)]
    upto = dict(zip(kept, accumulate(kept.values()), strict=True))
    near = 1e-6 * sum(kept.values())  # its exponentials and torch's differ in the last bit
    for token, point in zip(sampler.next_tokens(logits.expand(50, -1), rows), points, strict=True):
        assert token in kept
        share = point * sum(kept.values())
        assert upto[token] - kept[token] - near <= share <= upto[token] + near


def test_nan_logits_give_the_likeliest_of_the_others() -> None:
    runner = native_runner(random_model(GPT2), 1, torch.float32, 2)
    logits = torch.randn(4, 257)
    logits[0], logits[1, 30], logits[2, 40] = float("nan"), float("nan"), float("inf")
    logits[1, 50] = logits[3, 60] = 80.0
    params = [SamplingParams(), SamplingParams(), SamplingParams(top_p=0.9), SamplingParams()]
    tokens = runner.next_tokens(logits, [SamplingState(p, 1, [1], 1) for p in params])
    assert 0 <= tokens[0] < 257
    assert tokens[1:] == [50, 40, 60]


def test_a_width_that_the_kernel_cannot_handle_is_named() -> None:
    config = ModelConfig(vocab_size=257, family="gpt2", num_layers=1, num_heads=5, hidden_size=40, context_length=16)
    with pytest.raises(NativeUnavailable, match="hidden_size is 40; the native kernel needs a multiple of 16"):
        native_runner(GPT(config), 1, torch.float32)


def test_without_a_compiler_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.load_library.cache_clear()
    with pytest.raises(NativeUnavailable, match="CXX is 'no-such-compiler', which is no program"):
        native.load_library(torch.float32)
    native.load_library.cache_clear()


def test_the_compilers_message_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPT_FOUNDRY_HOME", str(tmp_path))
    monkeypatch.setattr(native, "EXTRA_FLAGS", ("-not-a-flag",))
    native.load_library.cache_clear()
    with pytest.raises(NativeUnavailable, match="not-a-flag"):
        native.load_library(torch.float32)
    native.load_library.cache_clear()
    assert not list((tmp_path / ".cache" / "native").iterdir())
