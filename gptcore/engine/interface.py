"""The types shared by the engine's parts.

A caller sends a `Request` and gets `Update`s until one has a finish reason. The engine sends a `Runner` `Chunk`s of
several sequences at once and gets the requested logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from gptcore.engine.settings import EngineSettings
from gptcore.errors import ConfigError
from gptcore.package import Package
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
    """The bytes it adds to the text; none for a generated special token."""
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
    draft_tokens: int = 0
    """Draft tokens that were computed since the previous update (speculation)."""
    accepted_tokens: int = 0
    """How many of them were accepted; each saved a step."""


def merge(updates: list[Update]) -> Update:
    """Merge consecutive updates of one request."""
    if len(updates) == 1:
        return updates[0]
    return replace(
        updates[-1],
        text="".join(update.text for update in updates),
        token_ids=tuple(token for update in updates for token in update.token_ids),
        logprobs=tuple(entry for update in updates for entry in update.logprobs),
        prompt_logprobs=tuple(entry for update in updates for entry in update.prompt_logprobs),
        draft_tokens=sum(update.draft_tokens for update in updates),
        accepted_tokens=sum(update.accepted_tokens for update in updates),
    )


@dataclass(frozen=True)
class EngineInfo:
    """How a model is run."""

    runner: str
    note: str
    """Why it is this runner and not a faster one, and why the context is shorter than the model's; empty if neither."""
    dtype: str
    device: str
    slots: int
    context_length: int
    cache_bytes: int
    invariant: bool
    """Whether logits are bit for bit the same however sequences are batched."""
    caveats: tuple[str, ...] = ()
    """What it does less exactly than our own engine, for people."""
    weights: str = ""
    """int8 or int4 if the matrices are quantised; empty: they are in `dtype`."""


@dataclass(frozen=True)
class EngineStats:
    """Counters: the first four are current values, the totals count since the start."""

    running: int
    waiting: int
    slots: int
    slots_used: int
    cached_tokens_reused_total: int
    prompt_tokens_total: int
    """Of started prompts, including tokens found in the cache."""
    generated_tokens_total: int
    steps_total: int
    draft_tokens_total: int = 0
    """Draft tokens that were computed (speculation)."""
    accepted_tokens_total: int = 0
    """How many of them were accepted."""


class Stepped(Protocol):
    """An engine that does its work in steps, as `AsyncEngine` drives it: our own, or vLLM.

    It belongs to one thread; others may read its properties, its statistics, and call `validate`.
    """

    package: Package
    settings: EngineSettings

    @property
    def info(self) -> EngineInfo:
        """Runner, precision, slots and memory."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it can still run a step; false once a process that it needs has died."""
        ...

    @property
    def busy(self) -> bool:
        """Whether there are open requests."""
        ...

    def validate(self, request: Request) -> None:
        """Raises ConfigError for a request that this model cannot run."""
        ...

    def add(self, request: Request) -> None:
        """Add `request` to the queue. Raises ConfigError if it is invalid, QueueFull if the queue is full."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request at the next step, which returns its last update. An unknown id is ignored."""
        ...

    def abort_all(self) -> None:
        """End every open request at the next step."""
        ...

    def step(self) -> list[Update]:
        """Run one step; return at most one update per request, or none after a short wait."""
        ...

    def stats(self) -> EngineStats:
        """The current counters."""
        ...

    def check(self) -> None:
        """Raises EngineError if the engine's state is inconsistent. Called before it sleeps."""
        ...

    def warm_up(self) -> None:
        """Run the model once. Raises EngineError if its output is not finite."""
        ...

    def close(self) -> None:
        """Free the model and the cache; the engine cannot be used afterwards."""
        ...


def validate(request: Request, context: int, longest: int, vocab_size: int) -> None:
    """Raises ConfigError for a prompt of more than `longest` tokens, none, or ids from `vocab_size` on."""
    length = len(request.prompt)
    if not length:
        raise ConfigError("the prompt is empty; expected at least one token", param="prompt")
    if length > longest:
        raise ConfigError(
            f"the prompt is {length} tokens long; this model's context is {context}, so at most {longest} fit",
            param="prompt",
        )
    for name, ids in (("prompt", request.prompt), ("stop_token_ids", request.params.stop_token_ids)):
        wrong = [token for token in ids if not 0 <= token < vocab_size]
        if wrong:
            raise ConfigError(
                f"{name} has the token id {wrong[0]}; this model's go from 0 to {vocab_size - 1}", param=name
            )


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence to run in this step."""

    slot: int
    start: int
    """Position of tokens[0] in the sequence; earlier positions are already in the slot."""
    tokens: Sequence[int]
    wanted: int
    """How many of the last tokens need logits: 0 (more of the prompt follows), 1, or all (prompt logprobs, a draft)."""


class Runner(Protocol):
    """Runs a network, with a cache for `slots` sequences of up to `context_length` tokens."""

    name: str
    """The kind of runner, for people: "native avx512_bf16", "torch", "torch, CUDA graphs"."""
    note: str
    """Why it is this one and not a faster one, and why the context is shorter than the model's; empty if neither."""
    dtype: torch.dtype
    weights: str
    """int8 or int4 if the matrices are quantised; empty: they are in `dtype`."""
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
