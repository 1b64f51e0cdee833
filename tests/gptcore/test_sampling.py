"""The next token follows the requested distribution, and its draw depends only on seed and position."""

import math
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gptcore.errors import ConfigError
from gptcore.model import GPT
from gptcore.package import Package
from gptcore.sampling import (
    ONE,
    SamplingParams,
    SamplingState,
    apply_penalties,
    choice_seed,
    filtered_probs,
    generate,
    generate_text,
    next_tokens,
    stream_text,
    token_weights,
    uniform,
)
from tests.chance import examples
from tests.sampling import PARAMS, VALUES, by_definition

LOGITS = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()
WORDS = 50257
"""The size of GPT-2's vocabulary, which is not a multiple of a vector's length."""


def next_token(logits: torch.Tensor, params: SamplingParams, seed: int, position: int) -> int:
    (token,) = next_tokens(logits[None], [SamplingState(params, seed, range(position), position)])
    return token


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


def test_a_draw_never_changes() -> None:
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
        ({"top_k": 3}, [0.5 / 0.9, 0.1 / 0.9, 0.3 / 0.9, 0]),
        ({"min_p": 0.5}, [0.625, 0, 0.375, 0]),
        ({"min_p": 0.19}, [0.5, 0.1, 0.3, 0.1]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"top_p": 0.81, "min_p": 0.5}, [0.625, 0, 0.375, 0]),
        ({"top_k": 1, "temperature": 9}, [1, 0, 0, 0]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": 1e-30}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.36, 0.01 / 0.36, 0.09 / 0.36, 0.01 / 0.36]),
        ({"temperature": 1e30}, [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_the_filters_keep_what_their_definitions_say(params: dict[str, float], expected: list[float]) -> None:
    assert probs(**params) == pytest.approx(expected, abs=1e-6)


@examples(200)
@given(VALUES, PARAMS, st.integers(0, 2**64 - 1))
@example([0.0, 0.0, 2.28e-38], SamplingParams(top_k=2), 0)
@example([0.0, 0.0, 1.4e-45], SamplingParams(top_p=0.5), 0)
def test_the_filters_and_the_draw_agree_with_a_full_sort_and_plain_sums(
    values: list[float], params: SamplingParams, seed: int
) -> None:
    logits = torch.tensor(values)
    kept = by_definition(logits, params)
    if not params.greedy:
        found = filtered_probs(logits, params)
        expected = torch.zeros(len(values), dtype=torch.float64)
        expected[list(kept)] = torch.tensor(list(kept.values()), dtype=torch.float64) / sum(kept.values())
        torch.testing.assert_close(found.double(), expected, atol=1e-7, rtol=1e-6)
    share = math.floor(uniform(seed, 7) * sum(kept.values()))
    upto = dict(zip(kept, accumulate(kept.values()), strict=True))
    expected_token = next(token for token in kept if upto[token] > share)
    assert next_token(logits, params, seed, position=7) == expected_token


@pytest.mark.parametrize(
    ("values", "params", "expected"),
    [
        ([0.0, 0.0, 2.28e-38], {"top_k": 1}, {2}),
        ([0.0, 0.0, 2.28e-38], {"temperature": 0}, {2}),
        ([0.0, 0.0, 2.28e-38], {"top_k": 2}, {0, 2}),
        ([0.0, 0.0, 2.28e-38], {"top_p": 0.3}, {2}),
        ([0.0, 0.0, 2.28e-38], {"top_p": 0.5}, {0, 2}),
        ([0.0, 0.0, 1.4e-45], {"top_k": 2}, {0, 2}),
        ([-0.0, 0.0, 0.0], {"top_k": 2}, {0, 1}),
        ([1.0, 2.0, 3.0], {"top_k": 2, "temperature": 1e30}, {1, 2}),
        ([1.0, 2.0, 3.0], {"top_p": 0.5, "temperature": 1e30}, {1, 2}),
        ([0.0, 0.0, 2.28e-38], {"min_p": 1.0}, {0, 1, 2}),
    ],
)
def test_among_equal_weights_the_tokens_with_the_greatest_logits_are_kept(
    values: list[float], params: dict[str, Any], expected: set[int]
) -> None:
    logits = torch.tensor(values)
    assert {*filtered_probs(logits, SamplingParams(**params)).nonzero().flatten().tolist()} == expected
    drawn = {next_token(logits, SamplingParams(**params), seed, 1) for seed in range(40)}
    assert drawn == expected


def test_min_p_is_not_rounded() -> None:
    logits = torch.tensor([0.0, math.log(9_000_000 / ONE)])
    weight = token_weights(logits[None], [1.0])[0, 1].item()
    just_above, exact = (weight + 0.4) / ONE, weight / ONE
    assert filtered_probs(logits, SamplingParams(min_p=just_above)).count_nonzero() == 1
    assert filtered_probs(logits, SamplingParams(min_p=exact)).count_nonzero() == 2


@pytest.mark.parametrize("spread", [0.3, 4.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    "filters",
    [{"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 50}, {"top_k": 2000, "top_p": 0.8}, {"min_p": 0.1, "top_p": 0.95}],
    ids=str,
)
def test_with_a_whole_vocabulary_the_filters_keep_what_they_should(filters: dict[str, Any], spread: float) -> None:
    logits = (torch.randn(WORDS) * spread).bfloat16().float()  # rounded, so that there are ties
    params = SamplingParams(**filters)
    assert filtered_probs(logits, params).nonzero().flatten().tolist() == list(by_definition(logits, params))


def test_weights_are_exponentials_rounded_to_whole_numbers() -> None:
    logits = torch.tensor([[3.0, 1.0, -5.0, -40.0, -math.inf]])
    weights = token_weights(logits, [2.0])[0].double()
    assert weights[0] == ONE
    assert (weights == weights.round()).all()
    exact = torch.tensor([math.exp((x - 3) / 2) * ONE for x in logits[0].tolist()])
    torch.testing.assert_close(weights, exact.double(), rtol=1e-6, atol=0.5)
    assert weights.cumsum(0)[-1] == sum(int(w) for w in weights)


def mixed_rows(count: int) -> list[SamplingState]:
    """Rows of all kinds, with a history of their own."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"top_k": 50},
        {"top_p": 0.9, "temperature": 1.3},
        {"min_p": 0.02},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "top_k": 9},
        {"temperature": 0.0, "repetition_penalty": 1.1},
    ]
    tokens = torch.randint(0, WORDS, (count, 30)).tolist()
    return [SamplingState(SamplingParams(**kinds[i % len(kinds)]), i, tokens[i], 20) for i in range(count)]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_rows_token_and_weights_do_not_depend_on_the_other_rows(threads: int) -> None:
    torch.set_num_threads(threads)
    rows = mixed_rows(18)
    logits = torch.randn(18, WORDS + 47)[:, :WORDS] * 3
    together = next_tokens(logits, rows)
    assert len(set(together)) > 9
    order = list(reversed(range(18)))
    assert next_tokens(logits[order], [rows[i] for i in order]) == together[::-1]
    weights = token_weights(logits, [0.8] * 18)
    for i, row in enumerate(rows):
        assert next_tokens(logits[i : i + 1], [row]) == [together[i]]
        assert torch.equal(token_weights(logits[i].clone()[None], [0.8])[0], weights[i])


def test_penalties_and_filters_agree_with_transformers() -> None:
    params = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.4)
    logits, prompt = torch.randn(1, 300) * 3, list(range(0, 300, 7))
    theirs = logits
    for processor in (
        RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
        TemperatureLogitsWarper(params.temperature),
        TopKLogitsWarper(params.top_k),
        TopPLogitsWarper(params.top_p),
        MinPLogitsWarper(params.min_p),
    ):
        theirs = processor(torch.tensor([prompt]), theirs)
    ours = filtered_probs(apply_penalties(logits, [SamplingState(params, 0, prompt, 5)])[0], params)
    torch.testing.assert_close(ours, theirs[0].softmax(0), atol=1e-6, rtol=0)


def test_presence_penalty_counts_a_generated_token_once_and_frequency_penalty_each_time() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    row = SamplingState(params, 0, tokens=[0, 1, 1, 2, 2, 2], prompt_length=2)
    logits = torch.zeros(2, 4)
    changed = apply_penalties(logits, [SamplingState(SamplingParams(), 0, [3, 3], 0), row])
    assert changed.tolist() == [[0, 0, 0, 0], [0, -0.75, -1.25, 0]]
    assert not logits.any()


def test_a_greedy_row_is_penalised_too() -> None:
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    assert next_tokens(logits, [SamplingState(SamplingParams(temperature=0), 0, [0], 0)]) == [0]
    assert next_tokens(logits, [SamplingState(SamplingParams(temperature=0, frequency_penalty=0.2), 0, [0], 0)]) == [1]


@pytest.mark.parametrize("params", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 0}], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_logits_still_give_a_token(bad: float, params: dict[str, Any]) -> None:
    logits = torch.tensor([[0.0, 1.0, bad, 2.0], [0.0, 9.0, 0.0, 0.0]])
    rows = [SamplingState(SamplingParams(**params), 0, [0], 0)] * 2
    first, second = next_tokens(logits, rows)
    assert first == 2
    assert [second] == next_tokens(logits[1:], rows[1:])


def test_the_choices_of_one_seed_get_different_seeds() -> None:
    assert choice_seed(-5, 0) == -5
    seeds = [choice_seed(seed, choice) for seed in range(200) for choice in range(1, 50)]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) < max(seeds) < 2**63
    assert choice_seed(7, 3) == choice_seed(7 + 2**64, 3)


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
        ({"min_p": -0.1}, r"min_p is -0\.1"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0\.0"),
        ({"presence_penalty": 2.5}, r"presence_penalty is 2\.5; expected -2 to 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"logprobs": 21}, "logprobs is 21; expected none, or 0 to 20"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"stop": ("a", "")}, r"stop is \('a', ''\); expected a list of strings that are not empty"),
        ({"stop": "abc"}, "stop is 'abc'"),
        ({"stop_token_ids": (3, -1)}, r"stop_token_ids is \(3, -1\)"),
    ],
)
def test_a_value_out_of_range_is_named(params: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        SamplingParams(**params)
    assert error.value.param == next(iter(params))


def test_lists_become_tuples() -> None:
    params = SamplingParams(stop=["a"], stop_token_ids=[1])  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids) == (("a",), (1,))
    assert hash(params)


@pytest.fixture
def model(package: Package) -> GPT:
    return package.load_model()


def test_the_same_seed_gives_the_same_text_and_another_seed_another(package: Package, model: GPT) -> None:
    def text(seed: int | None) -> str:
        return generate_text(model, package.tokenizer, "Once", SamplingParams(max_new_tokens=30, seed=seed))

    assert text(1) == text(1)
    assert len({text(1), text(2), text(None), text(None)}) == 4


def test_generation_equals_decoding_token_by_token_without_a_cache(package: Package, model: GPT) -> None:
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
    """The model with a head that always predicts `token`."""
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias = torch.nn.Parameter(100.0 * torch.eye(model.config.vocab_size)[token])
    return model


def test_generation_stops_at_the_end_of_text_and_leaves_it_out(package: Package, model: GPT) -> None:
    stopped = generate(biased(model, package.tokenizer.eot), package.tokenizer, "x", SamplingParams())
    assert list(stopped) == []


def test_generation_continues_after_end_of_text_if_asked(package: Package, model: GPT) -> None:
    always_end, eot = biased(model, package.tokenizer.eot), package.tokenizer.eot
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    assert list(generate(always_end, package.tokenizer, "x", params)) == [eot] * 5
    assert generate_text(always_end, package.tokenizer, "x", params) == ""
    stopped = SamplingParams(ignore_eos=True, stop_token_ids=(eot,))
    assert list(generate(always_end, package.tokenizer, "x", stopped)) == []


def test_generation_stops_at_a_stop_token_and_before_a_stop_string(package: Package, model: GPT) -> None:
    always_a, tokenizer = biased(model, ord("a")), package.tokenizer
    assert list(generate(always_a, tokenizer, "x", SamplingParams(stop_token_ids=(ord("b"), ord("a"))))) == []
    assert generate_text(always_a, tokenizer, "x", SamplingParams(stop=("b", "aaa"))) == ""
    assert generate_text(always_a, tokenizer, "x", SamplingParams(max_new_tokens=9, stop=("ab",))) == "a" * 9


def test_a_stop_string_ends_the_text_before_it(package: Package, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcore.sampling.generate", lambda *_: iter(b"one. two. three."))
    assert list(stream_text(model, package.tokenizer, "", SamplingParams(stop=(". th",)))) == [
        "o",
        "n",
        "e",
        ". tw",
        "o",
    ]


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
