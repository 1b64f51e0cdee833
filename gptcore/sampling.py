"""How a model speaks: logits in, the next token out, and from that a continuation of a prompt.

Randomness is a function of (seed, position in the sequence) and of nothing else, so the same seed and prompt give
the same text, whether a sequence is decoded alone or in a crowd.
"""

import codecs
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcore.errors import ConfigError
from gptcore.model import GPT, KVCache
from gptcore.tokenizer import Tokenizer

MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and how many there may be. Raises ConfigError for a value out of range.

    `temperature` 0 takes the likeliest token; `top_k` keeps the k likeliest (0: all); `top_p` then keeps the fewest
    whose probabilities reach p (Holtzman et al. 2020). Without `seed`, each generation draws its own.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        # Written so that NaN fails too.
        if not self.max_new_tokens >= 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature is {self.temperature}; expected 0 (greedy) or a positive number")
        if not self.top_k >= 0:
            raise ConfigError(f"top_k is {self.top_k}; expected 0 (off) or a number of tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; expected more than 0 and at most 1 (off)")


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone: splitmix64 (Steele et al. 2014), its hash twice."""
    z = (_mix(seed & MASK) + position * 0x9E3779B97F4A7C15) & MASK
    return (_mix(z) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def filtered_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities (V,) in fp32 that `params` leave of logits (V,); those ruled out are 0."""
    logits = logits.float()
    if params.temperature == 0:
        return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1.0)
    # The largest logit becomes 0 first: with a tiny temperature the quotient would overflow.
    order, index = ((logits - logits.max()) / params.temperature).sort(descending=True, stable=True)
    if 0 < params.top_k < len(order):
        order[params.top_k :] = -math.inf
    probs = order.softmax(dim=0)
    if params.top_p < 1:
        before = probs.cumsum(dim=0) - probs  # what likelier tokens hold already: 0 for the likeliest, which so stays
        probs = probs.where(before < params.top_p, 0.0)
        probs = probs / probs.sum()
    return torch.zeros_like(probs).scatter(0, index, probs)


def next_token(logits: Tensor, params: SamplingParams, seed: int, position: int) -> int:
    """The token that follows, from logits (V,), by the inverse of the cumulative distribution at uniform(...)."""
    if params.temperature == 0:
        return int(logits.argmax())
    cumulative = filtered_probs(logits, params).cpu().double().cumsum(dim=0)  # (V,); MPS has no float64
    point = uniform(seed, position) * cumulative[-1]
    return int(torch.searchsorted(cumulative, point, right=True))


def generate(model: GPT, tokenizer: Tokenizer, prompt: str, params: SamplingParams) -> Iterator[int]:
    """The tokens that follow `prompt`, one by one, up to <|endoftext|> (left out), max_new_tokens or a full context.

    An empty prompt asks for the beginning of a document. The model is to be in eval mode. Raises ConfigError, at
    once, for a prompt that fills the context.
    """
    tokens = tokenizer.encode(prompt) or [tokenizer.eot]
    context = model.config.context_length
    if len(tokens) >= context:
        raise ConfigError(
            f"the prompt is {len(tokens)} tokens long; this model's context is {context}, so at most {context - 1} fit"
        )
    return _generate(model, tokenizer, tokens, params)


def _generate(model: GPT, tokenizer: Tokenizer, tokens: list[int], params: SamplingParams) -> Iterator[int]:
    seed = secrets.randbits(64) if params.seed is None else params.seed
    weight = model.embed_tokens.weight
    end = min(len(tokens) + params.max_new_tokens, model.config.context_length)
    cache = KVCache(model.config, 1, end, dtype=weight.dtype, device=weight.device)
    new = tokens
    for position in range(len(tokens), end):
        with torch.inference_mode():
            logits = model(torch.tensor([new], device=weight.device), cache=cache)[0, -1]  # (V,)
        # The embedding may have spare rows behind the vocabulary.
        token = next_token(logits[: tokenizer.vocab_size], params, seed, position)
        if token == tokenizer.eot:
            return
        yield token
        new = [token]


def stream_text(model: GPT, tokenizer: Tokenizer, prompt: str, params: SamplingParams) -> Iterator[str]:
    """`generate` as text, in pieces of whole characters; bytes that are no UTF-8 become U+FFFD."""
    tokens = generate(model, tokenizer, prompt, params)
    return _decode(tokens, tokenizer)


def _decode(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if text := decoder.decode(tokenizer.decode_bytes([token])):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest


def generate_text(model: GPT, tokenizer: Tokenizer, prompt: str, params: SamplingParams) -> str:
    """The whole continuation of `prompt` as text, without the prompt."""
    return "".join(stream_text(model, tokenizer, prompt, params))
