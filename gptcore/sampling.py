"""How a model speaks: logits in, the next token out, and from that a continuation of a prompt.

Randomness is a function of (seed, position in the sequence) and of nothing else. Probabilities are counted in whole
numbers, whose sums are exact in any order. So the same seed and prompt give the same text, whether a sequence is
decoded alone or in a crowd, and on whatever the sums are made.
"""

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptcore.errors import ConfigError
from gptcore.model import GPT, KVCache
from gptcore.text import TextStream
from gptcore.tokenizer import Tokenizer

MASK = (1 << 64) - 1
ONE = 2.0**35
"""The weight of the likeliest token. Others have proportionally less, rounded to whole numbers, so a vocabulary of up
to 2^18 tokens sums to less than 2^53, which fp64 holds exactly."""
CACHED = 2**18
"""Weights that a CPU's second cache holds with room to spare."""
MOST_LOGPROBS = 20
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-30, 1e30
"""Beyond these, fp32 would make a temperature 0 or infinite; it counts as the nearer of them."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to stop. Raises ConfigError, naming the field, for a value out of range.

    In this order, which is that of Hugging Face's transformers: penalties change the logits, `temperature` divides
    them, `top_k`, `top_p` and `min_p` rule tokens out. (vLLM has min_p before top_k and top_p.)

    Which of two tokens is likelier, their logits say after the penalties: the greater one's token is, and of equal
    logits the one with the smaller id. Neither a temperature that makes them all alike nor the rounding of their
    probabilities changes that. So top_k = 1 is what temperature 0 is, whatever the logits.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    """0 takes the likeliest token; below 1 is safer, above 1 wilder."""
    top_k: int = 0
    """Keeps the k likeliest tokens, never more, even if others are as likely; 0: all."""
    top_p: float = 1.0
    """Keeps the fewest of the likeliest whose probabilities reach p, of what top_k left (Holtzman et al. 2020); 1:
    all."""
    seed: int | None = None
    """Without one, each generation draws its own."""
    min_p: float = 0.0
    """Keeps tokens at least this many times as likely as the likeliest (Nguyen et al. 2024); 0: all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of prompt and output become less likely: divides their logits where positive, multiplies them
    elsewhere (Keskar et al. 2019); 1: off."""
    presence_penalty: float = 0.0
    """Is taken off the logit of each token that was generated before, as in OpenAI's API; 0: off."""
    frequency_penalty: float = 0.0
    """Is taken off once for each time the token was generated; 0: off."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    """The text ends before any of these tokens."""
    ignore_eos: bool = False
    """Goes on after <|endoftext|>, which has no text."""
    logprobs: int | None = None
    """Reports each token's logprob and so many of the likeliest at its place; None: neither."""

    def __post_init__(self) -> None:
        # Written so that NaN fails too.
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            ("top_k", self.top_k >= 0, "0 (off) or a number of tokens"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "0 (off) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a positive number, 1 for none"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2, 0 for none"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2, 0 for none"),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                f"none, or 0 to {MOST_LOGPROBS}",
            ),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a list of strings that are not empty"),
            ("stop_token_ids", all(token >= 0 for token in self.stop_token_ids), "token ids, none below 0"),
        )
        for name, fits, expected in checks:
            if not fits:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {expected}", param=name)
        for name in ("stop", "stop_token_ids"):  # callers may pass lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken: nothing is left to chance."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalises(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def filters(self) -> bool:
        """Whether some tokens are ruled out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class Row:
    """One sequence that is to go on: its parameters, its seed, and its tokens so far."""

    params: SamplingParams
    seed: int
    tokens: Sequence[int]
    """Prompt and what was generated; the new token's position is their number."""
    prompt_length: int


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone: splitmix64 (Steele et al. 2014), its hash twice."""
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


def next_tokens(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """The token that follows each row, from logits (R, V), by the inverse of the cumulative distribution.

    The tokens, in the order of their ids, share out [0, 1); the one into whose share `uniform(seed, position)` falls
    is it. It depends on the row's own logits and parameters, not on the rows beside it. Where logits are no finite
    numbers, it is the place of the largest, as at temperature 0.
    """
    if logits.device.type == "mps":
        logits = logits.cpu()  # MPS has no fp64
    logits = penalised(logits.detach().float(), rows)
    points = [uniform(row.seed, len(row.tokens)) for row in rows]
    tokens: list[int | None] = [None] * len(rows)
    plain = [i for i, row in enumerate(rows) if not (row.params.greedy or row.params.filters)]
    # Many rows at once keep a GPU busy; a CPU is faster with so few that they stay in its caches.
    size = len(rows) if logits.is_cuda else max(1, CACHED // logits.size(1))
    for part in (plain[i : i + size] for i in range(0, len(plain), size)):
        weights = weigh(_select(logits, part), [rows[i].params.temperature for i in part])
        for i, place in zip(part, _drawn(weights, [points[i] for i in part]), strict=True):
            tokens[i] = place
    for i, row in enumerate(rows):
        if row.params.filters and not row.params.greedy:
            ids, weights = _kept(logits[i], row.params)
            place = _drawn(weights[None], [points[i]])[0] if len(ids) else None
            tokens[i] = None if place is None else int(ids[place])
    likeliest = [i for i, token in enumerate(tokens) if token is None]
    if likeliest:
        best = _select(logits, likeliest).max(dim=-1).indices  # argmax says the same, but far slower on a CPU
        for i, token in zip(likeliest, best.tolist(), strict=True):
            tokens[i] = token
    return [token for token in tokens if token is not None]


def _select(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """The rows of logits (R, V) that are named, ascending; no copy if they are neighbours."""
    begin, end = rows[0], rows[-1] + 1
    return logits[begin:end] if end - begin == len(rows) else logits[list(rows)]


def filtered_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities (V,) in fp32 that temperature and filters leave of logits (V,); those ruled out are 0."""
    probs = torch.zeros_like(logits, dtype=torch.float32)
    if params.greedy:
        return probs.index_fill(0, logits.argmax(), 1.0)
    ids, weights = _kept(logits.detach().float(), params)
    return probs.index_put((ids.to(probs.device),), (weights / weights.double().sum()).to(probs))


def penalised(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits (R, V) after the penalties: a changed copy, or the same if there are none."""
    if any(row.params.penalises for row in rows):
        logits = logits.clone()
    for i, row in enumerate(rows):
        if row.params.penalises:
            ids, values = penalties(logits[i], row)
            logits[i, ids] = values
    return logits


def penalties(logits: Tensor, row: Row) -> tuple[Tensor, Tensor]:
    """The ids of the row's tokens so far (N,), ascending, and what the penalties make of their logits, of (V,)."""
    params = row.params
    unique, places = np.unique(np.asarray(row.tokens, dtype=np.int64), return_inverse=True)
    generated = np.bincount(places[row.prompt_length :], minlength=len(unique))
    off = params.presence_penalty * (generated > 0) + params.frequency_penalty * generated
    ids = torch.from_numpy(unique).to(logits.device)
    seen, factor = logits[ids], params.repetition_penalty
    return ids, torch.where(seen > 0, seen / factor, seen * factor) - torch.from_numpy(off).to(seen)


def weigh(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """exp(logits / temperature) for logits (R, V), in whole numbers of which each row's largest is ONE."""
    # The largest logit becomes 0 first: with a tiny temperature the quotient would overflow.
    below = logits - logits.amax(dim=-1, keepdim=True)
    heat = torch.tensor(temperatures, device=logits.device).clamp(LEAST_TEMPERATURE, MOST_TEMPERATURE)[
        :, None
    ]  # (R, 1)
    return below.div_(heat).exp_().mul_(ONE).round_()


def _drawn(weights: Tensor, points: Sequence[float]) -> list[int | None]:
    """For each row of weights (R, V) the first place up to which more than its point's share of all lies.

    None if weights are no numbers. Sums of whole numbers in fp64 are exact, however they are made.
    """
    upto = weights.cumsum(dim=-1, dtype=torch.float64)  # (R, V)
    total = upto[:, -1:]
    share = torch.tensor(points, dtype=torch.float64, device=weights.device)[:, None] * total
    places = torch.searchsorted(upto, share.floor().minimum(total - 1), right=True)[:, 0].tolist()
    return [place if place < weights.size(1) else None for place in places]


def _kept(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The ids that the filters leave of logits (V,), ascending, and their weights, on the CPU.

    Nothing is sorted but what may be kept. Of a token that top_p keeps, it and those less likely together hold more
    than 1 - p, and it is the likeliest of them, so it holds more than (1 - p) / V itself.
    """
    logits = logits.cpu()
    weights, values = weigh(logits[None], [params.temperature])[0].numpy(), logits.numpy()
    total = weights.sum(dtype=np.float64)
    if 0 < params.top_k < len(weights):
        ids = greatest(values, params.top_k)
        total = weights[ids].sum(dtype=np.float64)
    else:
        least = (1 - params.top_p) * total / len(weights) * (1 - 1e-6)  # rounding must not rule out more
        ids = np.flatnonzero(weights >= least)
    if params.top_p < 1:
        descending = np.sort(weights[ids])[::-1]
        before = descending.cumsum(dtype=np.float64) - descending  # what likelier tokens hold: 0 for the likeliest
        ids = ids[greatest(values[ids], int(np.searchsorted(before, params.top_p * total)))]
    ids = ids[weights[ids] >= np.float64(max(1, params.min_p * ONE))]  # compared in fp64, which rounds neither
    return torch.from_numpy(ids), torch.from_numpy(weights[ids])


def greatest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` greatest values, ascending; of equal values the first ones."""
    if not 0 < count < len(values):
        return np.arange(len(values))[:count]
    least = np.partition(values, -count)[-count]
    kept = values > least
    kept[np.flatnonzero(values == least)[: count - np.count_nonzero(kept)]] = True
    return np.flatnonzero(kept)


def generate(model: GPT, tokenizer: Tokenizer, prompt: str, params: SamplingParams) -> Iterator[int]:
    """The tokens that follow `prompt`, one by one, up to <|endoftext|> or a stop token (left out) or a limit.

    The limits are max_new_tokens and the context. An empty prompt asks for the beginning of a document. The model is to
    be in eval mode. Raises ConfigError, at once, for a prompt that fills the context.
    """
    tokens = tokenizer.encode(prompt) or [tokenizer.eot]
    context = model.config.context_length
    if len(tokens) >= context:
        raise ConfigError(
            f"the prompt is {len(tokens)} tokens long; this model's context is {context}, so at most {context - 1} fit"
        )
    return _generate(model, tokenizer, tokens, params)


def _generate(model: GPT, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams) -> Iterator[int]:
    seed = secrets.randbits(63) if params.seed is None else params.seed
    last = {*params.stop_token_ids} if params.ignore_eos else {tokenizer.eot, *params.stop_token_ids}
    weight = model.embed_tokens.weight
    end = min(len(prompt) + params.max_new_tokens, model.config.context_length)
    cache = KVCache(model.config, 1, end, dtype=weight.dtype, device=weight.device)
    tokens = list(prompt)
    while len(tokens) < end:
        new = tokens[cache.length :]
        with torch.inference_mode():
            logits = model(torch.tensor([new], device=weight.device), cache=cache)[:, -1]  # (1, V)
            # The embedding may have spare rows behind the vocabulary.
            (token,) = next_tokens(logits[:, : tokenizer.vocab_size], [Row(params, seed, tokens, len(prompt))])
        if token in last:
            return
        yield token
        tokens.append(token)


def stream_text(model: GPT, tokenizer: Tokenizer, prompt: str, params: SamplingParams) -> Iterator[str]:
    """`generate` as text, in pieces of whole characters, up to a stop string; bytes that are no UTF-8 become U+FFFD."""
    tokens = generate(model, tokenizer, prompt, params)
    return _decode(tokens, tokenizer, params.stop)


def _decode(tokens: Iterator[int], tokenizer: Tokenizer, stop: Sequence[str]) -> Iterator[str]:
    stream = TextStream(tokenizer, stop)
    for token in tokens:
        if text := stream.push(token):
            yield text
        if stream.stopped:
            return
    if rest := stream.flush():
        yield rest


def generate_text(model: GPT, tokenizer: Tokenizer, prompt: str, params: SamplingParams) -> str:
    """The whole continuation of `prompt` as text, without the prompt."""
    return "".join(stream_text(model, tokenizer, prompt, params))
