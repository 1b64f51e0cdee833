"""The next token follows the distribution that was asked for, and depends on seed and position alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.errors import ConfigError
from gptcore.model import GPT
from gptcore.package import Package
from gptcore.sampling import (
    SamplingParams,
    filtered_probs,
    generate,
    generate_text,
    next_token,
    stream_text,
    uniform,
)

LOGITS = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()


def probs(**params: float) -> list[float]:
    return filtered_probs(LOGITS, SamplingParams(**params)).tolist()  # type: ignore[arg-type]


def test_the_draws_are_uniform_and_independent_of_each_other() -> None:
    draws = torch.tensor([[uniform(seed, position) for position in range(200)] for seed in range(200)])
    assert draws.min() >= 0
    assert draws.max() < 1
    histogram = torch.histc(draws, bins=20) / draws.numel()
    assert (histogram - 0.05).abs().max() < 0.005
    centred = draws - 0.5
    for neighbour in (centred.roll(1, 0), centred.roll(1, 1), centred.roll((1, -1), (0, 1))):
        assert abs((centred * neighbour).mean() * 12) < 0.03


def test_a_draw_is_the_same_for_ever() -> None:
    assert uniform(1, 2) == uniform(1 + 2**64, 2) != uniform(2, 1)
    assert uniform(0, 0) == 0.6524484863740322
    assert uniform(1337, 42) == 0.8796181351403449


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.5, 0.1, 0.3, 0.1]),
        ({"top_k": 2}, [0.625, 0, 0.375, 0]),
        ({"top_k": 9}, [0.5, 0.1, 0.3, 0.1]),
        ({"top_p": 0.79}, [0.625, 0, 0.375, 0]),
        ({"top_p": 0.81}, [0.5 / 0.9, 0.1 / 0.9, 0.3 / 0.9, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": 1e-30}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.36, 0.01 / 0.36, 0.09 / 0.36, 0.01 / 0.36]),
        ({"temperature": 1e30}, [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_the_filters_leave_what_their_definitions_say(params: dict[str, float], expected: list[float]) -> None:
    assert probs(**params) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    st.integers(0, 50),
    st.floats(0.01, 1),
    st.integers(0, 2**64 - 1),
)
def test_a_token_that_was_ruled_out_is_never_drawn(
    logits: list[float], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    kept = filtered_probs(torch.tensor(logits), params)
    assert kept.sum().item() == pytest.approx(1, abs=1e-5)
    assert kept[torch.tensor(logits).argmax()] > 0
    assert (kept > 0).sum() <= (top_k or len(logits))
    assert kept[next_token(torch.tensor(logits), params, seed, position=7)] > 0


def test_frequencies_follow_the_probabilities() -> None:
    params = SamplingParams(temperature=0.7, top_k=3)
    draws = torch.tensor([next_token(LOGITS, params, 3, position) for position in range(4000)])
    frequencies = torch.bincount(draws, minlength=4) / len(draws)
    assert (frequencies - filtered_probs(LOGITS, params)).abs().max() < 0.03


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, r"temperature is -1\.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
    ],
)
def test_a_value_out_of_range_is_named(params: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**params)


@pytest.fixture
def model(package: Package) -> GPT:
    return package.load_model()


def test_the_same_seed_gives_the_same_text_and_another_seed_another(package: Package, model: GPT) -> None:
    def text(seed: int | None) -> str:
        return generate_text(model, package.tokenizer, "Once", SamplingParams(max_new_tokens=30, seed=seed))

    assert text(1) == text(1)
    assert len({text(1), text(2), text(None), text(None)}) == 4


def test_generation_is_decoding_without_a_cache_token_by_token(package: Package, model: GPT) -> None:
    params = SamplingParams(max_new_tokens=20, top_k=40, seed=5)
    tokens = package.tokenizer.encode("Once upon")
    expected: list[int] = []
    for position in range(len(tokens), len(tokens) + 20):
        logits = model(torch.tensor([tokens + expected]))[0, -1]
        token = next_token(logits[: package.tokenizer.vocab_size], params, 5, position)
        if token == package.tokenizer.eot:
            break
        expected.append(token)
    assert list(generate(model, package.tokenizer, "Once upon", params)) == expected


def biased(model: GPT, token: int) -> GPT:
    """The model with a head that says `token`, whatever comes in."""
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias = torch.nn.Parameter(100.0 * torch.eye(model.config.vocab_size)[token])
    return model


def test_generation_stops_at_the_end_of_text_and_leaves_it_out(package: Package, model: GPT) -> None:
    stopped = generate(biased(model, package.tokenizer.eot), package.tokenizer, "x", SamplingParams())
    assert list(stopped) == []


def test_generation_stops_at_the_token_limit_and_at_a_full_context(package: Package, model: GPT) -> None:
    always_a, tokenizer = biased(model, ord("a")), package.tokenizer
    assert generate_text(always_a, tokenizer, "x", SamplingParams(max_new_tokens=5)) == "aaaaa"
    assert generate_text(always_a, tokenizer, "x" * 60, SamplingParams(max_new_tokens=500)) == "aaaa"


def test_padding_rows_are_never_sampled(package: Package, model: GPT) -> None:
    row = package.tokenizer.vocab_size
    tokens = list(generate(biased(model, row), package.tokenizer, "x", SamplingParams(max_new_tokens=40, seed=1)))
    assert tokens
    assert max(tokens) < row


def test_an_empty_prompt_begins_a_document(package: Package, model: GPT) -> None:
    params = SamplingParams(max_new_tokens=1, temperature=0)
    first = next(generate(model, package.tokenizer, "", params))
    logits = model(torch.tensor([[package.tokenizer.eot]]))[0, -1]
    assert first == int(logits[:257].argmax())


def test_a_prompt_that_fills_the_context_is_refused_at_once(package: Package, model: GPT) -> None:
    with pytest.raises(ConfigError, match="prompt is 64 tokens long; this model's context is 64, so at most 63 fit"):
        generate(model, package.tokenizer, "x" * 64, SamplingParams())


def test_streamed_pieces_are_whole_characters(package: Package, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcore.sampling.generate", lambda *_: iter("aé中🧑".encode() + b"\xe4"))
    pieces = list(stream_text(model, package.tokenizer, "", SamplingParams()))
    assert pieces == ["a", "é", "中", "🧑", "\ufffd"]
