"""Replies to an order: one JSON document, or server-sent events."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gptcore.engine import TokenLogprob, Update
from serve_app.generation.stream import Generation

to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
"""Compact JSON. The encoder is made once, since a stream encodes every token."""

Write = Callable[[Generation, Send], Awaitable[None]]


@dataclass
class SequenceResult:
    """Everything one sequence generated."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True)
class Form:
    """How a route writes replies with choices."""

    head: Callable[[Generation], dict[str, Any]]
    """The fields before the choices."""
    logprobs: Callable[[], Callable[[Sequence[TokenLogprob]], Any]]
    """Called once per choice; returns the function that converts its tokens, in one call or one per event."""
    whole: Callable[[str], dict[str, Any]] = lambda text: {"text": text}
    """The fields of a choice that hold its text."""
    part: Callable[[str, bool], dict[str, Any]] = lambda text, first: {"text": text}
    """The same in an event, and whether that is the first of the choice."""
    last_usage: bool = True
    """Whether the last event of a stream has the usage. A reply that is not streamed always has it."""
    null_usage: bool = False
    """Whether the other events have a usage of null."""


class GenerationResponse(Response):
    """Runs an order while its reply is sent, and stops when the client leaves.

    All of it happens within one context, so the lease always ends. An error before the first token still becomes a
    reply with its own status. Written by hand, since Starlette does not listen for disconnects from ASGI 2.4 on.
    """

    def __init__(self, generation: AbstractAsyncContextManager[Generation], write: Write) -> None:
        super().__init__()
        self._generation = generation
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def run_order() -> None:
            async with self._generation as generation:
                await self._write(generation, send)

        await unless_client_leaves(receive, run_order())


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, and cancel it when the client closes the connection. Raises what `work` raises."""

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
        await asyncio.gather(task, left, return_exceptions=True)  # slots and lease are released


def as_json(render: Callable[[Generation, list[SequenceResult]], dict[str, Any]]) -> Write:
    """Send one JSON reply, made by `render`, when every sequence has ended."""

    async def write(generation: Generation, send: Send) -> None:
        choices = [SequenceResult() for _ in range(generation.order.size)]
        texts: list[list[str]] = [[] for _ in choices]
        async for index, update in generation:
            texts[index].append(update.text)
            choices[index].logprobs += update.prompt_logprobs + update.logprobs
            choices[index].finish_reason = update.finish_reason
        for choice, parts in zip(choices, texts, strict=True):
            choice.text = "".join(parts)

        def encoded() -> bytes:
            return to_json(render(generation, choices)).encode()

        # Many log-probabilities take a while to encode; the event loop has other streams to serve.
        body = encoded() if generation.order.params.logprobs is None else await asyncio.to_thread(encoded)
        await send(_start(generation, b"application/json", length=len(body)))
        await send({"type": "http.response.body", "body": body})

    return write


def as_choices(form: Form) -> Write:
    """Send one JSON reply with all choices and the usage."""

    def render(generation: Generation, choices: list[SequenceResult]) -> dict[str, Any]:
        asked = generation.order.params.logprobs is not None
        return {
            **form.head(generation),
            "choices": [
                {
                    "index": index,
                    **form.whole(choice.text),
                    "logprobs": form.logprobs()(choice.logprobs) if asked else None,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": generation.usage(),
        }

    return as_json(render)


class Events:
    """The JSON of a stream's events. The part that all of them share is encoded once."""

    def __init__(self, form: Form, generation: Generation) -> None:
        self._form = form
        self._generation = generation
        self._head = to_json({**form.head(generation), "choices": []})[:-2]
        self._tail = '],"usage":null}' if form.null_usage else "]}"
        asked = generation.order.params.logprobs is not None
        self._begun: set[int] = set()
        self._logprobs = [form.logprobs() for _ in range(generation.order.size)] if asked else None

    def update(self, index: int, update: Update) -> str:
        """The event for one update; "" if it has nothing new."""
        tokens = update.prompt_logprobs + update.logprobs
        if not (update.text or tokens or update.finish_reason):
            return ""
        logprobs = to_json(self._logprobs[index](tokens)) if self._logprobs else "null"
        reason = f'"{update.finish_reason}"' if update.finish_reason else "null"
        text = to_json(self._form.part(update.text, index not in self._begun))[1:-1]
        self._begun.add(index)
        choice = f'{{"index":{index},{text},"logprobs":{logprobs},"finish_reason":{reason}}}'
        return f"{self._head}{choice}{self._tail}"

    def last(self) -> str:
        """The event with the usage; "" if the form has none."""
        return f'{self._head}],"usage":{to_json(self._generation.usage())}}}' if self._form.last_usage else ""


def as_events(form: Form) -> Write:
    """Send server-sent events as updates come, then `[DONE]`. The headers wait for the first update."""

    async def write(generation: Generation, send: Send) -> None:
        events, started = Events(form, generation), False
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
    headers = [(b"content-type", content_type), (b"x-model-version", generation.served.name_version.encode("latin-1"))]
    if length is None:
        headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]  # so that proxies do not buffer it
    else:
        headers.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": 200, "headers": headers}
