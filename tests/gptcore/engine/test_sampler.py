"""Each row gets its token, and logprobs of the model's own distribution if it asks."""

import pytest
import torch

from gptcore.engine.sampler import SampledToken, SamplingState, sample, token_logprobs
from gptcore.sampling import SamplingParams, next_tokens

VOCAB, SPARE = 300, 20


def row(seed: int = 0, tokens: list[int] | None = None, **params: float) -> SamplingState:
    return SamplingState(SamplingParams(**params), seed, tokens or [1, 2, 3], 2)  # type: ignore[arg-type]


@pytest.fixture
def logits() -> torch.Tensor:
    """Logits of six rows. The padding ids have the greatest ones."""
    logits = torch.randn(6, VOCAB + SPARE) * 3
    logits[:, VOCAB:] = 50.0
    return logits


ROWS = [
    row(1),
    row(2, temperature=0.0, logprobs=2),
    row(3, top_p=0.5, logprobs=0),
    row(4, temperature=9.0, repetition_penalty=1.5, logprobs=5),
    row(5, top_k=3, logprobs=2),
    row(6, min_p=0.3),
]


def test_tokens_match_the_definition_and_padding_ids_are_never_chosen(logits: torch.Tensor) -> None:
    before = logits.clone()
    choices = sample(logits, ROWS, VOCAB)
    assert [choice.token for choice in choices] == next_tokens(logits[:, :VOCAB], ROWS)
    assert all(i < VOCAB for choice in choices for i in (choice.token, *(i for i, _ in choice.top)))
    assert torch.equal(logits, before)


def test_a_choice_does_not_depend_on_the_other_rows(logits: torch.Tensor) -> None:
    together = sample(logits, ROWS, VOCAB)
    assert [sample(logits[i : i + 1], ROWS[i : i + 1], VOCAB)[0] for i in range(6)] == together
    assert sample(logits.flip(0), ROWS[::-1], VOCAB) == together[::-1]


def test_logprobs_are_the_models_own_for_all_parameters(logits: torch.Tensor) -> None:
    exact = logits[:, :VOCAB].double().log_softmax(dim=-1)
    for i, choice in enumerate(sample(logits, ROWS, VOCAB)):
        asked = ROWS[i].params.logprobs
        if asked is None:
            assert choice == SampledToken(choice.token)
            continue
        assert choice.logprob == pytest.approx(exact[i, choice.token].item(), abs=2e-6)
        best = exact[i].topk(asked)
        assert [token for token, _ in choice.top] == best.indices.tolist()
        assert [logprob for _, logprob in choice.top] == pytest.approx(best.values.tolist(), abs=2e-6)


def test_given_tokens_are_scored_and_ties_list_the_lowest_ids() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 9.0], [1.0, 1.0, 1.0, 1.0, 1.0, 9.0]])
    first, second = token_logprobs(logits, [2, 4], top=3, vocab_size=5)
    assert (first.token, second.token) == (2, 4)
    assert [token for token, _ in first.top] == [1, 3, 2]
    assert [token for token, _ in second.top] == [0, 1, 2]
    exact = logits[:, :5].log_softmax(-1)
    assert first.logprob == pytest.approx(exact[0, 2].item(), abs=1e-6)
    assert first.top[2] == (2, first.logprob)
    assert second.logprob == pytest.approx(exact[1, 4].item(), abs=1e-6)


def test_half_precision_logits_are_scored_in_full() -> None:
    logits = torch.randn(2, 40).bfloat16()
    scored = token_logprobs(logits, [3, 4], top=0, vocab_size=40)
    exact = logits.float().log_softmax(-1)
    assert [choice.logprob for choice in scored] == pytest.approx([exact[0, 3].item(), exact[1, 4].item()], abs=1e-6)
    assert all(choice.top == () for choice in scored)
