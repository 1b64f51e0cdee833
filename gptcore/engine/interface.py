"""What the engine's parts agree on.

A caller sends a `Request` and gets `Update`s until one has a finish reason. The engine sends a `Runner` `Chunk`s of
several sequences at once and gets the logits of the tokens that need them.
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
    """`max_new_tokens` are there, or the context is full."""
    ABORT = "abort"
    """The caller asked for it."""
    ERROR = "error"
    """The engine died."""


@dataclass(frozen=True)
class Request:
    """One sequence to continue. `request_id` is unique among the requests that an engine holds."""

    request_id: str
    prompt: tuple[int, ...]
    """Token ids, at least one and fewer than the context holds."""
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
    """The token's bytes as text; bytes that are no whole characters become U+FFFD."""
    bytes: tuple[int, ...]
    """What it adds to the text: nothing if it is a generated end of text."""
    logprob: float | None
    """None for the first token of a prompt, which follows nothing."""
    top: tuple["TokenLogprob", ...] = ()
    """The likeliest tokens at this place, likeliest first, as many as were asked for."""


@dataclass(frozen=True)
class Update:
    """What became known of one sequence since its last update. The last one alone has a finish reason."""

    request_id: str
    text: str
    """Newly releasable text: whole characters, never part of a stop string."""
    token_ids: tuple[int, ...]
    """Tokens generated since the last update; the end-of-text or stop token that ended the sequence is among them."""
    logprobs: tuple[TokenLogprob, ...]
    """Of `token_ids`, one each, if asked for."""
    finish_reason: FinishReason | None
    prompt_tokens: int
    generated_tokens: int
    """So far, in all updates together."""
    cached_tokens: int
    """Prompt tokens that were not computed anew."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens, in the first update, if asked for."""
    queue_seconds: float = 0.0
    """How long the request waited for its slot."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence to run in this step."""

    slot: int
    start: int
    """Position of tokens[0] in the sequence; the slot holds the positions before it already."""
    tokens: Sequence[int]
    wanted: int
    """How many of the last tokens need logits: 0 (more of the prompt is to come), 1, or all (prompt logprobs)."""


class Runner(Protocol):
    """A network with room for `slots` sequences of up to `context_length` tokens."""

    name: str
    """What computes, for people: "native avx512_bf16", "torch", "torch, CUDA graphs"."""
    note: str
    """Why it is this one and not a faster one; empty if there is none faster."""
    dtype: torch.dtype
    device: torch.device
    slots: int
    context_length: int
    vocab_size: int
    """Columns of the logits: the tokenizer's ids, and spare rows of the embedding behind them."""
    cache_bytes: int
    """Memory that keys and values take."""
    invariant: bool
    """A token's logits depend on its prefix alone, bit for bit, however it was cut into chunks or batched.

    Where false, decoding (a chunk of one token with logits wanted) and prefill round differently, so what a slot
    holds may be reused for another sequence only as far as prefill computed it.
    """
    reuse_granularity: int
    """Prompts are cut, and prefixes reused, only at positions that are multiples of this; 1: anywhere."""

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits (sum of wanted, V) in fp32, in the order of `chunks`, of which no two may share a slot.

        Writes keys and values of every token. The result may be overwritten by the next call.
        """
        ...

    def next_tokens(self, logits: Tensor, rows: Sequence[SamplingState]) -> list[int]:
        """The token that follows each row, from logits (R, vocabulary): `gptcore.sampling.next_tokens` or as good."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of a slot to another, which loses what it held."""
        ...

    def close(self) -> None:
        """Frees weights and cache; nothing may be called after."""
        ...
