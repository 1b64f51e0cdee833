"""What goes into the engine and what comes out: a `Request`, then `Update`s until one has a finish reason.

Plain data without behaviour, so that whoever talks to an engine (a thread, a service, a test) needs this module and
`gptcore.sampling` alone.
"""

from dataclasses import dataclass
from enum import StrEnum

from gptcore.sampling import SamplingParams


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
