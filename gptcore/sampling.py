"""Samples tokens from logits, and continues a prompt with them.

Randomness is a function of (seed, position in the sequence) only. Probabilities are whole numbers, whose sums are exact
in any order. So the same seed and prompt give the same text, whether a sequence is decoded alone or in a batch, and
on any device that computes the same logits.
"""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptcore.errors import ConfigError
from gptcore.model import GPT, KVCache
from gptcore.parameters import SamplingParams
from gptcore.text import TextStream
from gptcore.tokenizer import Tokenizer

MASK = (1 << 64) - 1
ONE = 2.0**35
"""The weight of the likeliest token. Other weights are proportional, rounded to whole numbers, so a vocabulary of up to
2^18 tokens sums to less than 2^53, which fp64 represents exactly."""
CACHED = 2**18
"""Number of weights that fit into a CPU's second-level cache."""
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-30, 1e30
"""Temperatures are clamped to this range, since fp32 would round them to 0 or infinity beyond it."""


@dataclass(frozen=True)
class SamplingState:
    """What sampling needs to know of one sequence: its parameters, its seed, and its tokens so far."""

    params: SamplingParams
    seed: int
    tokens: Sequence[int]
    """The prompt and the generated tokens; their number is the new token's position."""
    prompt_length: int


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) only: splitmix64 (Steele et al. 2014), its hash twice."""
    z = (_mix(seed & MASK) + position * 0x9E3779B97F4A7C15) & MASK
    return (_mix(z) >> 11) * 2.0**-53


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one of several continuations of a prompt: `seed` itself for choice 0, then others in [0, 2^63)."""
    return seed if choice == 0 else _mix(_mix(seed & MASK) ^ choice) >> 1


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def next_tokens(logits: Tensor, rows: Sequence[SamplingState]) -> list[int]:
    """The next token of each row, from logits (R, V), by inverting the cumulative distribution.

    Tokens divide [0, 1) in the order of their ids; the one whose part contains `uniform(seed, position)` is chosen. It
    depends on the row's own logits and parameters only. If logits are not finite, the largest is taken, as at
    temperature 0.
    """
    if logits.device.type == "mps":
        logits = logits.cpu()  # MPS has no fp64
    logits = apply_penalties(logits.detach().float(), rows)
    points = [uniform(row.seed, len(row.tokens)) for row in rows]
    tokens: list[int | None] = [None] * len(rows)
    plain = [i for i, row in enumerate(rows) if not (row.params.greedy or row.params.filters)]
    # Many rows at once keep a GPU busy; a CPU is faster with few rows that fit into its cache.
    size = len(rows) if logits.is_cuda else max(1, CACHED // logits.size(1))
    for part in (plain[i : i + size] for i in range(0, len(plain), size)):
        weights = token_weights(_select_rows(logits, part), [rows[i].params.temperature for i in part])
        for i, place in zip(part, _draw(weights, [points[i] for i in part]), strict=True):
            tokens[i] = place
    for i, row in enumerate(rows):
        if row.params.filters and not row.params.greedy:
            ids, weights = _filter(logits[i], row.params)
            place = _draw(weights[None], [points[i]])[0] if len(ids) else None
            tokens[i] = None if place is None else int(ids[place])
    likeliest = [i for i, token in enumerate(tokens) if token is None]
    if likeliest:
        best = _select_rows(logits, likeliest).max(dim=-1).indices  # argmax says the same, but far slower on a CPU
        for i, token in zip(likeliest, best.tolist(), strict=True):
            tokens[i] = token
    return [token for token in tokens if token is not None]


def _select_rows(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """The given rows of logits (R, V), ascending; a view if they are adjacent."""
    begin, end = rows[0], rows[-1] + 1
    return logits[begin:end] if end - begin == len(rows) else logits[list(rows)]


def filtered_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities (V,) in fp32 of logits (V,) after temperature and filters; 0 for tokens ruled out."""
    probs = torch.zeros_like(logits, dtype=torch.float32)
    if params.greedy:
        return probs.index_fill(0, logits.argmax(), 1.0)
    ids, weights = _filter(logits.detach().float(), params)
    return probs.index_put((ids.to(probs.device),), (weights / weights.double().sum()).to(probs))


def apply_penalties(logits: Tensor, rows: Sequence[SamplingState]) -> Tensor:
    """Logits (R, V) after the penalties: a changed copy, or the same tensor if there are none."""
    if any(row.params.penalises for row in rows):
        logits = logits.clone()
    for i, row in enumerate(rows):
        if row.params.penalises:
            ids, values = penalties(logits[i], row)
            logits[i, ids] = values
    return logits


def penalties(logits: Tensor, row: SamplingState) -> tuple[Tensor, Tensor]:
    """The ids of the row's tokens so far (N,), ascending, and their logits after the penalties (N,)."""
    params = row.params
    unique, places = np.unique(np.asarray(row.tokens, dtype=np.int64), return_inverse=True)
    generated = np.bincount(places[row.prompt_length :], minlength=len(unique))
    off = params.presence_penalty * (generated > 0) + params.frequency_penalty * generated
    ids = torch.from_numpy(unique).to(logits.device)
    seen, factor = logits[ids], params.repetition_penalty
    return ids, torch.where(seen > 0, seen / factor, seen * factor) - torch.from_numpy(off).to(seen)


def token_weights(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """exp(logits / temperature) for logits (R, V), in whole numbers of which each row's largest is ONE."""
    # The largest logit becomes 0 first: with a tiny temperature the quotient would overflow.
    below = logits - logits.amax(dim=-1, keepdim=True)
    heat = torch.tensor(temperatures, device=logits.device).clamp(LEAST_TEMPERATURE, MOST_TEMPERATURE)[
        :, None
    ]  # (R, 1)
    return below.div_(heat).exp_().mul_(ONE).round_()


def _draw(weights: Tensor, points: Sequence[float]) -> list[int | None]:
    """For each row of weights (R, V), the first index whose cumulative sum exceeds point × total.

    None if weights are NaN. Sums of whole numbers in fp64 are exact in any order.
    """
    upto = weights.cumsum(dim=-1, dtype=torch.float64)  # (R, V)
    total = upto[:, -1:]
    share = torch.tensor(points, dtype=torch.float64, device=weights.device)[:, None] * total
    places = torch.searchsorted(upto, share.floor().minimum(total - 1), right=True)[:, 0].tolist()
    return [place if place < weights.size(1) else None for place in places]


def _filter(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The ids of logits (V,) that pass the filters, ascending, and their weights, on the CPU.

    Only tokens that may be kept are sorted. If top_p keeps a token, it and all less likely ones together have more than
    1 - p, and it is the likeliest of them, so it has more than (1 - p) / V itself.
    """
    logits = logits.cpu()
    weights, values = token_weights(logits[None], [params.temperature])[0].numpy(), logits.numpy()
    total = weights.sum(dtype=np.float64)
    if 0 < params.top_k < len(weights):
        ids = top_indices(values, params.top_k)
        total = weights[ids].sum(dtype=np.float64)
    else:
        least = (1 - params.top_p) * total / len(weights) * (1 - 1e-6)  # rounding must not rule out more
        ids = np.flatnonzero(weights >= least)
    if params.top_p < 1:
        descending = np.sort(weights[ids])[::-1]
        before = descending.cumsum(dtype=np.float64) - descending  # what likelier tokens hold: 0 for the likeliest
        ids = ids[top_indices(values[ids], int(np.searchsorted(before, params.top_p * total)))]
    ids = ids[weights[ids] >= np.float64(max(1, params.min_p * ONE))]  # compared in fp64, which rounds neither
    return torch.from_numpy(ids), torch.from_numpy(weights[ids])


def top_indices(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest values, ascending; of equal values, the first ones."""
    if not 0 < count < len(values):
        return np.arange(len(values))[:count]
    least = np.partition(values, -count)[-count]
    kept = values > least
    kept[np.flatnonzero(values == least)[: count - np.count_nonzero(kept)]] = True
    return np.flatnonzero(kept)


def generate(model: GPT, tokenizer: Tokenizer, prompt: str | list[int], params: SamplingParams) -> Iterator[int]:
    """Generate tokens after `prompt`, a text or ids, up to the end of text or a stop token (both left out) or a limit.

    The limits are max_new_tokens and the context. An empty prompt begins a document. The model must be in eval mode.
    Raises ConfigError, before the first token, for a prompt that fills the context.
    """
    tokens = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
    context = model.config.context_length
    if len(tokens) >= context:
        raise ConfigError(
            f"the prompt is {len(tokens)} tokens long; this model's context is {context}, so at most {context - 1} fit"
        )
    return _generate(model, tokenizer, tokens, params)


def _generate(model: GPT, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams) -> Iterator[int]:
    seed = secrets.randbits(63) if params.seed is None else params.seed
    last = {*params.stop_token_ids} if params.ignore_eos else {*tokenizer.stops, *params.stop_token_ids}
    weight = model.embed_tokens.weight
    end = min(len(prompt) + params.max_new_tokens, model.config.context_length)
    cache = KVCache(model.config, 1, end, dtype=weight.dtype, device=weight.device)
    tokens = list(prompt)
    while len(tokens) < end:
        new = tokens[cache.length :]
        with torch.inference_mode():
            logits = model(torch.tensor([new], device=weight.device), cache=cache)[:, -1]  # (1, V)
            # The embedding may have spare rows after the vocabulary.
            (token,) = next_tokens(
                logits[:, : tokenizer.vocab_size], [SamplingState(params, seed, tokens, len(prompt))]
            )
        if token in last:
            return
        yield token
        tokens.append(token)


def stream_text(model: GPT, tokenizer: Tokenizer, prompt: str | list[int], params: SamplingParams) -> Iterator[str]:
    """`generate` as text, in pieces of whole characters, up to a stop string; invalid UTF-8 becomes U+FFFD."""
    tokens = generate(model, tokenizer, prompt, params)
    begins = not prompt if isinstance(prompt, str) else tokenizer.special.issuperset(prompt)
    return _decode(tokens, TextStream(tokenizer, params.stop, begins=begins))


def _decode(tokens: Iterator[int], stream: TextStream) -> Iterator[str]:
    for token in tokens:
        if text := stream.push(token):
            yield text
        if stream.stopped:
            return
    if rest := stream.flush():
        yield rest


def generate_text(model: GPT, tokenizer: Tokenizer, prompt: str | list[int], params: SamplingParams) -> str:
    """The complete continuation of `prompt` as text, without the prompt."""
    return "".join(stream_text(model, tokenizer, prompt, params))
