"""Samples the next token of many sequences from their logits, with logprobs where requested.

Takes logits (R, V) and one `SamplingState` per sequence; returns one `SampledToken` each. `gptcore.sampling` does the
sampling itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gptcore.engine.interface import TokenLogprob
from gptcore.sampling import SamplingState, next_tokens, top_indices
from gptcore.tokenizer import Tokenizer

__all__ = ["SampledToken", "SamplingState", "describe", "sample", "token_logprobs"]


@dataclass(frozen=True)
class SampledToken:
    """A token and, if requested, its logprob and the likeliest tokens' (id, logprob), likeliest first.

    Logprobs are in nats, of the model's distribution at temperature 1, before penalties and filters.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(
    logits: Tensor,
    rows: Sequence[SamplingState],
    vocab_size: int,
    draw: Callable[[Tensor, Sequence[SamplingState]], list[int]] = next_tokens,
) -> list[SampledToken]:
    """The next token of each row, from logits (R, V); ids from `vocab_size` on are never chosen.

    Rows do not affect each other, and the logits are not changed. `draw` is a runner's `next_tokens`.
    """
    logits = logits[:, :vocab_size]
    tokens = draw(logits, rows)
    choices = [SampledToken(token) for token in tokens]
    for i, row in enumerate(rows):
        if (top := row.params.logprobs) is not None:
            choices[i : i + 1] = token_logprobs(logits[i : i + 1], tokens[i : i + 1], top, vocab_size)
    return choices


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int, vocab_size: int) -> list[SampledToken]:
    """`tokens` with their logprobs under logits (R, V), and `top` alternatives each."""
    choices = []
    for values, token in zip(logits[:, :vocab_size].detach().float().cpu().numpy(), tokens, strict=True):
        largest = float(values.max())
        log_sum = largest + math.log(np.exp(values - largest).sum(dtype=np.float64))  # of exp(logits)
        ids = top_indices(values, top)
        ids = ids[(-values[ids]).argsort(kind="stable")]
        likeliest = tuple((int(i), float(values[i]) - log_sum) for i in ids)
        choices.append(SampledToken(token, float(values[token]) - log_sum, likeliest))
    return choices


def describe(choice: SampledToken, tokenizer: Tokenizer, generated: bool = False) -> TokenLogprob:
    """The token and its alternatives with their texts, as callers get them."""

    def entry(token: int, logprob: float | None, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        content = tokenizer.decode_bytes([token])
        silent = generated and token in tokenizer.special
        text = content.decode("utf-8", errors="replace")
        return TokenLogprob(token, text, () if silent else tuple(content), logprob, top)

    return entry(choice.token, choice.logprob, tuple(entry(*other) for other in choice.top))
