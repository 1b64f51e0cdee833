"""What one HTTP request asks to have generated, and the service's limits on it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gptcore.chat import ChatTemplate
from gptcore.errors import PackageError
from gptcore.parameters import SamplingParams
from gptcore.tokenizer import Tokenizer
from serve_app.errors import ApiError
from serve_app.generation.conversation import Conversation, Encoded, encode_conversation
from serve_app.models.load import ServedModel
from serve_app.settings import ServeSettings

MOST_LOGPROBS = 100_000
"""Log-probabilities in a reply that is not streamed: about 8 MB of JSON, a second's work."""
LONG_TEXT = 4096
"""Characters from which a prompt is encoded in a thread, so that the event loop can serve other streams meanwhile."""
ANSWER_SHARE = 4
"""A truncated conversation leaves one part in so many of the context to an answer of no given length."""


Prompt = str | Sequence[int] | Conversation
"""A text, token ids, or what a template makes a text of."""


@dataclass(frozen=True)
class Order:
    """What one HTTP request wants generated."""

    model: str | None
    prompts: Sequence[Prompt]
    """An empty text, or no ids, begins a document."""
    params: SamplingParams
    n: int = 1
    echo: bool = False
    prompt_only: bool = False
    """Report on the prompts and generate nothing."""
    prompt_field: str = "prompt"
    """The route's name for the prompts."""
    length_field: str = "max_new_tokens"
    """The route's name for `params.max_new_tokens`."""
    default_length: bool = False
    """The client gave no length: one above the service's limit is shortened instead of refused."""
    stream: bool = False
    """The client wants the text as it is generated."""
    add_special_tokens: bool = True
    """A prompt that is a text begins with the tokenizer's `bos`, if it has one."""

    @property
    def size(self) -> int:
        """How many sequences to generate."""
        return len(self.prompts) * self.n


def within_limits(order: Order, served: ServedModel, settings: ServeSettings) -> Order:
    """The order, with a default length shortened to the limit. Raises ApiError if it exceeds the service's limits."""
    length, most = order.params.max_new_tokens, settings.max_new_tokens
    # More than slots and queue together would never be admitted, so a 503 "try again later" would be wrong.
    places = min(settings.max_sequences, served.engine.info.slots + settings.max_queue)
    if order.size > places:
        raise _too_much(
            "n" if order.n > 1 else order.prompt_field, "the number of prompts times n is", order.size, places
        )
    if length > most:
        if not order.default_length:
            raise _too_much(order.length_field, f"{order.length_field} is", length, most)
        order = replace(order, params=replace(order.params, max_new_tokens=most))
    return order


def room_for_prompt(order: Order, context: int, settings: ServeSettings) -> int:
    """Most tokens of a truncated conversation, so that its answer may have the length that the client asks for."""
    answer = order.params.max_new_tokens
    if order.default_length or answer >= context:  # no conversation leaves so much room
        answer = min(answer, context // ANSWER_SHARE or 1)
    return min(context - answer, settings.max_prompt_tokens or context)


def check_prompts(order: Order, prompts: Sequence[Sequence[int]], context: int, settings: ServeSettings) -> None:
    """Raises ApiError if a prompt is too long, or if an unstreamed reply would hold too many log-probabilities."""
    longest, most = max(map(len, prompts)), settings.max_prompt_tokens
    if most and longest > most:  # 0: the context is the limit, which the engine checks
        raise _too_much(order.prompt_field, "the prompt's length in tokens is", longest, most)
    conversation = order.prompts[0]
    if isinstance(conversation, Conversation) and longest >= context:
        what = "last turn takes" if conversation.truncate else "messages take"
        most_here = f"this model's maximum context length is {context}"  # words by which litellm knows the error
        message = f"the {what} {longest} tokens; {most_here}, of which an answer needs one"
        raise ApiError(400, message, param="messages", code="context_length_exceeded")
    if order.params.logprobs is None or order.stream:
        return
    length = 0 if order.prompt_only else order.params.max_new_tokens
    lengths = [(len(prompt), min(length, context - len(prompt))) for prompt in prompts]
    tokens = sum(order.echo * prompt + max(0, generated) for prompt, generated in lengths)
    asked = order.n * tokens * (1 + order.params.logprobs)
    if asked > MOST_LOGPROBS:
        what = "the number of log-probabilities, unless streamed, may come to"
        raise _too_much("logprobs", what, asked, MOST_LOGPROBS)


def _too_much(param: str, what: str, value: int, most: int) -> ApiError:
    return ApiError(400, f"{what} {value}; at most {most} are allowed here", param=param, code="invalid_value")


async def encode_prompt(served: ServedModel, prompt: Prompt, bos: bool, room: int) -> Encoded:
    """The prompt's token ids, with the tokenizer's `bos` before a text; those of an empty prompt begin a document.

    A conversation that may be truncated has at most `room` tokens if its last turn has.

    Raises ApiError for a conversation if the model has no chat template, and ConfigError if that refuses it.
    """
    tokenizer = served.package.tokenizer
    if isinstance(prompt, Conversation):
        return await asyncio.to_thread(encode_conversation, template_of(served), prompt, room)
    ids = (*(tokenizer.bos if bos else ()), *await encode(tokenizer, prompt)) if isinstance(prompt, str) else prompt
    return Encoded(tuple(ids or tokenizer.encode_prompt("")))


def template_of(served: ServedModel) -> ChatTemplate:
    """The model's chat template. Raises ApiError if it has none that works."""
    why = "has no chat template, so it only continues text"
    try:
        if served.chat_template:
            return served.chat_template
    except PackageError as error:
        why = f"cannot chat: {error}"
    message = f"model {served.name!r} {why}; send a prompt to /v1/completions or /generate"
    raise ApiError(400, message, param="model", code="no_chat_template")


async def encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The token ids of `text`, without blocking the event loop."""
    return tuple(tokenizer.encode(text) if len(text) < LONG_TEXT else await asyncio.to_thread(tokenizer.encode, text))
