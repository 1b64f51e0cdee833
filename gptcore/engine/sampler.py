"""Logits of many sequences to their next tokens, and to logprobs for those that ask.

In come logits (R, V) and one `Row` per sequence; out comes one `Choice` each. How a token is drawn is
`gptcore.sampling`'s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcore.sampling import ONE, Row, greatest, next_tokens, weigh

__all__ = ["Choice", "Row", "sample", "token_logprobs"]


@dataclass(frozen=True)
class Choice:
    """A token, and its logprob and the likeliest tokens' (id, logprob), likeliest first, as far as asked for.

    Logprobs are in nats, of the model's distribution at temperature 1, before penalties and filters.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, rows: Sequence[Row], vocab_size: int) -> list[Choice]:
    """The token that follows each of `rows`, from logits (R, V); ids from `vocab_size` on are never chosen.

    No row's choice depends on the others. The logits are left as they are.
    """
    logits = logits[:, :vocab_size]
    tokens = next_tokens(logits, rows)
    choices = [Choice(token) for token in tokens]
    for top in {row.params.logprobs for row in rows} - {None}:
        asked = [i for i, row in enumerate(rows) if row.params.logprobs == top]
        scored = token_logprobs(logits[asked], [tokens[i] for i in asked], top or 0, vocab_size)
        for i, choice in zip(asked, scored, strict=True):
            choices[i] = choice
    return choices


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int, vocab_size: int) -> list[Choice]:
    """`tokens` as if they had been chosen from logits (R, V), with their logprobs and `top` alternatives each."""
    choices = []
    for row, token in zip(logits[:, :vocab_size].detach().cpu().float(), tokens, strict=True):
        values = row.numpy()
        total = weigh(row[None], [1.0]).sum(dtype=torch.float64)  # exact: see ONE
        log_sum = float(row.max()) + math.log(total / ONE)  # of exp(logits)
        ids = greatest(values, top)
        ids = ids[(-values[ids]).argsort(kind="stable")]
        likeliest = tuple((int(i), float(values[i]) - log_sum) for i in ids)
        choices.append(Choice(token, float(values[token]) - log_sum, likeliest))
    return choices
