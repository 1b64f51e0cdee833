"""From a checked body to the engine and back: the one road that all generating routes take.

In comes an `Order`: prompts, sampling parameters, n. Every sequence of it is submitted at once, and their updates
come back as one stream of (index, Update), which `as_json` and `as_events` turn into a reply. The model is leased
until the last token, so that a new version does not pull it away. When one sequence fails, the client leaves or the
time is up, all sequences of the order are aborted.
"""

import asyncio
import json
import math
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gptcore.engine import FinishReason, Request, Stream, TokenLogprob, Update
from gptcore.errors import EngineError, FoundryError
from gptcore.sampling import SamplingParams, choice_seed
from gptcore.tokenizer import Tokenizer
from serve_app.errors import ApiError
from serve_app.metrics import SequenceTimer
from serve_app.models.load import ServedModel
from serve_app.settings import ServeSettings
from serve_app.state import AppState

MOST_LOGPROBS = 100_000
"""Log-probabilities in a reply of one piece: some 8 MB of JSON, a second's work."""
LONG_TEXT = 4096
"""Characters from which a prompt is encoded in a thread: the event loop has other streams to serve meanwhile."""
SEED_BITS = 32
"""Of a seed drawn here; a JSON number of so many bits is exact everywhere."""

to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
"""JSON as short as it gets; made once, since a stream writes it for every token."""


@dataclass(frozen=True)
class Order:
    """What one HTTP request wants generated."""

    model: str | None
    prompts: Sequence[str | Sequence[int]]
    """Texts or token ids; no ids at all: the beginning of a document."""
    params: SamplingParams
    n: int = 1
    echo: bool = False
    prompt_only: bool = False
    """Report on the prompts and generate nothing."""
    length_field: str = "max_new_tokens"
    """What the route calls `params.max_new_tokens`."""
    default_length: bool = False
    """The client named no length: where it is more than the service allows, it is shortened and not refused."""
    stream: bool = False
    """The client wants the text as it comes."""


@dataclass
class Choice:
    """All that came of one sequence."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


class Generation:
    """The sequences of one order, in flight on one version of one model. To be iterated once.

    The j-th continuation of the i-th prompt has index i * n + j.
    """

    def __init__(self, order: Order, served: ServedModel, prompts: Sequence[tuple[int, ...]]) -> None:
        self.order = order
        self.served = served
        self.id = uuid.uuid4().hex  # not the request's: a client may use that one twice
        self.seed = secrets.randbits(SEED_BITS) if order.params.seed is None else order.params.seed
        self._prompts = prompts
        self._streams: list[Stream] = []
        self._timers: list[SequenceTimer] = []
        self._latest: list[Update | None] = [None] * self.size

    @property
    def size(self) -> int:
        """How many sequences there are."""
        return len(self.order.prompts) * self.order.n

    @property
    def model_version(self) -> str:
        """Name and version of the model that answers, as every reply names it."""
        return f"{self.served.name}/{self.served.version}"

    def submit(self, state: AppState, since: float) -> None:
        """Hands all sequences to the engine; `since` (perf_counter) is when the request came.

        Raises ConfigError, QueueFull or EngineError, as the engine does.
        """
        order, served = self.order, self.served
        interval = state.settings.stream_interval_ms / 1e3 if order.stream else math.inf
        for index in range(self.size):
            i, j = divmod(index, order.n)
            request = Request(
                request_id=f"{self.id}-{index}",
                prompt=self._prompts[i],
                params=replace(order.params, seed=choice_seed(self.seed, j)),
                prompt_only=order.prompt_only,
                prompt_logprobs=order.echo and order.params.logprobs is not None,
            )
            self._streams.append(served.engine.generate(request, interval))
            self._timers.append(state.metrics.sequence(served.name, served.version, since))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Update]]:
        """The updates as they come, until every sequence has ended; the prompt leads the text if it is echoed.

        Raises EngineError if a sequence ends before its time.
        """
        async for index, update in merged(self._streams):
            self._timers[index].update(update)
            if update.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                raise EngineError(f"sequence {update.request_id} ended in {str(update.finish_reason)!r}")
            if self.order.echo and self._latest[index] is None:
                update = self._led(index, update)
            self._latest[index] = update
            yield index, update

    def _led(self, index: int, update: Update) -> Update:
        """`update` with the prompt's text before its own; the token that stands for no prompt has no text."""
        prompt, logprobs = self.order.prompts[index // self.order.n], update.prompt_logprobs
        if not prompt and logprobs:
            logprobs = (replace(logprobs[0], bytes=()), *logprobs[1:])
        text = prompt if isinstance(prompt, str) else self.served.package.tokenizer.decode(prompt)
        return replace(update, text=text + update.text, prompt_logprobs=logprobs)

    def usage(self) -> dict[str, Any]:
        """Tokens in and out, once all sequences have ended. A prompt counts once, however often it was continued."""
        ends, n = [update for update in self._latest if update is not None], self.order.n
        prompt, completion = sum(map(len, self._prompts)), sum(end.generated_tokens for end in ends)
        # Further continuations find in the cache what the first one put there: the least is what was there before.
        cached = sum(min(end.cached_tokens for end in ends[i : i + n]) for i in range(0, len(ends), n))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def close(self) -> None:
        """Aborts what has not ended."""
        for stream in self._streams:
            await stream.aclose()
        for timer in self._timers:
            timer.close()


async def merged(streams: Sequence[AsyncIterator[Update]]) -> AsyncIterator[tuple[int, Update]]:
    """(index, update) of all streams as they come. Raises what one of them raises."""
    if len(streams) == 1:  # the usual case, and the fast one: no task, no queue
        async for update in streams[0]:
            yield 0, update
        return
    # Bounded, so that what a slow reader leaves is merged in the engine's mailboxes and does not pile up here.
    queue: asyncio.Queue[tuple[int, Update | FoundryError | None]] = asyncio.Queue(len(streams))

    async def pump(index: int, stream: AsyncIterator[Update]) -> None:
        try:
            async for update in stream:
                await queue.put((index, update))
            await queue.put((index, None))
        except FoundryError as error:
            await queue.put((index, error))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            index, item = await queue.get()
            if isinstance(item, FoundryError):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()


@asynccontextmanager
async def generating(state: AppState, request_id: str, order: Order) -> AsyncIterator[Generation]:
    """The order in flight; whatever has not ended when the context is left is aborted, then the lease is given back.

    Raises ApiError for a model that is not there or an order beyond the service's limits, and what the engine raises.
    """
    since = time.perf_counter()
    async with state.models.lease(order.model, request_id) as served:
        order = within_limits(order, served, state.settings)
        prompts = [await _encode(served.package.tokenizer, prompt) for prompt in order.prompts]
        _check_prompts(prompts, state.settings)
        _check_logprobs(order, prompts, served.package.config.context_length)
        generation = Generation(order, served, prompts)
        try:
            generation.submit(state, since)
            yield generation
        finally:
            await generation.close()


def within_limits(order: Order, served: ServedModel, settings: ServeSettings) -> Order:
    """The order, its length shortened if that was a default. Raises ApiError for more than the service allows."""
    count, length, most = len(order.prompts) * order.n, order.params.max_new_tokens, settings.max_new_tokens
    # More than the engine has places for would never be admitted: 503 and "try again" would be untrue.
    places = min(settings.max_sequences, served.engine.info.slots + settings.max_queue)
    if count > places:
        raise _too_much("n" if order.n > 1 else "prompt", "the number of prompts, times n, is", count, places)
    if length > most:
        if not order.default_length:
            raise _too_much(order.length_field, f"{order.length_field} is", length, most)
        order = replace(order, params=replace(order.params, max_new_tokens=most))
    return order


def _check_prompts(prompts: Sequence[Sequence[int]], settings: ServeSettings) -> None:
    longest, most = max(map(len, prompts)), settings.max_prompt_tokens
    if most and longest > most:  # 0: the context is the bound, and the engine's to judge
        raise _too_much("prompt", "the prompt's length in tokens is", longest, most)


def _check_logprobs(order: Order, prompts: Sequence[Sequence[int]], context: int) -> None:
    """Raises ApiError if a reply of one piece would have too many."""
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


async def _encode(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        return tuple(prompt) or (tokenizer.eot,)
    return await encoded(tokenizer, prompt) or (tokenizer.eot,)


async def encoded(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The token ids of `text`, without holding up the event loop."""
    return tuple(tokenizer.encode(text) if len(text) < LONG_TEXT else await asyncio.to_thread(tokenizer.encode, text))


Write = Callable[[Generation, Send], Awaitable[None]]


class Answer(Response):
    """The reply to an order: carries it out, and stops when the client leaves.

    All happens while the reply is sent, within one context, so nothing can come between a lease and its end. What is
    raised before the first token still becomes a reply with its own status.
    """

    def __init__(self, generation: AbstractAsyncContextManager[Generation], write: Write) -> None:
        super().__init__()
        self._generation = generation
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def carry_out() -> None:
            async with self._generation as generation:
                await self._write(generation, send)

        await unless_client_leaves(receive, carry_out())


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`, and cancels it once the client has closed the connection. Raises what `work` raises."""

    async def client_leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.create_task(work), asyncio.create_task(client_leaves())
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        task.cancel()
        left.cancel()
        await asyncio.gather(task, left, return_exceptions=True)  # the slots are free and the lease is given back


def as_json(render: Callable[[Generation, list[Choice]], dict[str, Any]]) -> Write:
    """Waits for every sequence's end; `render` makes the reply of what came."""

    async def write(generation: Generation, send: Send) -> None:
        choices = [Choice() for _ in range(generation.size)]
        texts: list[list[str]] = [[] for _ in choices]
        async for index, update in generation:
            texts[index].append(update.text)
            choices[index].logprobs += update.prompt_logprobs + update.logprobs
            choices[index].finish_reason = update.finish_reason
        for choice, parts in zip(choices, texts, strict=True):
            choice.text = "".join(parts)

        def written() -> bytes:
            return to_json(render(generation, choices)).encode()

        # Many log-probabilities take a while to write, and the event loop has other streams to serve.
        body = written() if generation.order.params.logprobs is None else await asyncio.to_thread(written)
        await send(_start(generation, b"application/json", length=len(body)))
        await send({"type": "http.response.body", "body": body})

    return write


class Events(Protocol):
    """How a route writes its stream: JSON per update, "" for one that has nothing to tell, and what comes last."""

    def update(self, index: int, update: Update) -> str: ...

    def last(self) -> str: ...


def as_events(events_of: Callable[[Generation], Events]) -> Write:
    """Sends server-sent events as the updates come, `[DONE]` at the end. The first update comes before the headers."""

    async def write(generation: Generation, send: Send) -> None:
        events, started = events_of(generation), False
        async for index, update in generation:
            if not started:
                await send(_start(generation, b"text/event-stream; charset=utf-8"))
                started = True
            if event := events.update(index, update):
                await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
        last = events.last()
        end = f"data: {last}\n\ndata: [DONE]\n\n" if last else "data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": end.encode()})

    return write


def _start(generation: Generation, content_type: bytes, length: int | None = None) -> dict[str, Any]:
    headers = [(b"content-type", content_type), (b"x-model-version", generation.model_version.encode("latin-1"))]
    if length is None:
        headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]  # proxies: do not hold it back
    else:
        headers.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": 200, "headers": headers}
