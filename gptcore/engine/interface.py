"""The types shared by the engine's parts.

A caller sends a `Request` and gets `Update`s until one has a finish reason. The engine sends a `Runner` `Chunk`s of
several sequences at once and gets the requested logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from gptcore.sampling import SamplingParams, SamplingState


class FinishReason(StrEnum):
    """Why a sequence ended; the members are their strings."""

    STOP = "stop"
    """The end-of-text token, a stop string or a stop token id."""
    LENGTH = "length"
    """`max_new_tokens` were generated, or the context is full."""
    ABORT = "abort"
    """The caller aborted it."""
    ERROR = "error"
    """The engine died."""


@dataclass(frozen=True)
class Request:
    """One sequence to continue. `request_id` is unique among an engine's open requests."""

    request_id: str
    prompt: tuple[int, ...]
    """Token ids: at least one, and fewer than the context length."""
    params: SamplingParams
    prompt_logprobs: bool = False
    """Also report the logprobs of the prompt's tokens, `params.logprobs` alternatives each; reuses no prefix then."""
    prompt_only: bool = False
    """Run the prompt, which may then fill the context, and generate nothing."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability in nats under the model at temperature 1, before penalties and filters."""

    token_id: int
    text: str
    """The token's bytes as text; incomplete characters become U+FFFD."""
    bytes: tuple[int, ...]
    """The bytes it adds to the text; none for a generated end-of-text token."""
    logprob: float | None
    """None for the first token of a prompt."""
    top: tuple["TokenLogprob", ...] = ()
    """The likeliest tokens at this position, likeliest first, as many as requested."""


@dataclass(frozen=True)
class Update:
    """The new part of one sequence since its previous update. Only the last update has a finish reason."""

    request_id: str
    text: str
    """New text: whole characters, never part of a stop string."""
    token_ids: tuple[int, ...]
    """Tokens generated since the previous update, including the end-of-text or stop token that ended the sequence."""
    logprobs: tuple[TokenLogprob, ...]
    """One per entry of `token_ids`, if requested."""
    finish_reason: FinishReason | None
    prompt_tokens: int
    generated_tokens: int
    """In total, over all updates so far."""
    cached_tokens: int
    """Prompt tokens found in the cache."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Those of the prompt, in the first update, if requested."""
    queue_seconds: float = 0.0
    """How long the request waited for its slot."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence to run in this step."""

    slot: int
    start: int
    """Position of tokens[0] in the sequence; earlier positions are already in the slot."""
    tokens: Sequence[int]
    wanted: int
    """How many of the last tokens need logits: 0 (more of the prompt follows), 1, or all (prompt logprobs)."""


class Runner(Protocol):
    """Runs a network, with a cache for `slots` sequences of up to `context_length` tokens."""

    name: str
    """The kind of runner, for people: "native avx512_bf16", "torch", "torch, CUDA graphs"."""
    note: str
    """Why it is this one and not a faster one; empty if there is none faster."""
    dtype: torch.dtype
    device: torch.device
    slots: int
    context_length: int
    vocab_size: int
    """Columns of the logits: the tokenizer's ids, then spare rows of the embedding."""
    cache_bytes: int
    """Bytes of the key/value cache."""
    invariant: bool
    """A token's logits depend on its prefix only, bit for bit, however it was split into chunks or batched.

    If false, decoding (a chunk of one token with logits) and prefill round differently, so another sequence may reuse
    only what prefill computed.
    """
    reuse_granularity: int
    """Prompts are split, and prefixes reused, only at multiples of this; 1: anywhere."""

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run the chunks, which must be in different slots; return logits (sum of wanted, V) in fp32, in their order.

        Stores every token's keys and values. The next call may overwrite the result.
        """
        ...

    def next_tokens(self, logits: Tensor, rows: Sequence[SamplingState]) -> list[int]:
        """The next token of each row, from logits (R, vocabulary), as `gptcore.sampling.next_tokens` gives it."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another, whose content is lost."""
        ...

    def close(self) -> None:
        """Free weights and cache; the runner cannot be used afterwards."""
        ...
