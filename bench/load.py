"""The load of `bench.serve`: some streams at once, each asking again as soon as it has been answered.

The same prompts go over HTTP to a service, or straight into an engine in the client's own process. Out come the
moments at which text arrived; nothing is computed or parsed meanwhile but where an event ends, since the client shares
the machine with what it measures.
"""

import asyncio
import functools
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.turns import Play
from gptcore.engine import EngineSettings, Request
from gptcore.engine.async_engine import AsyncEngine
from gptcore.engine.engine import Engine
from gptcore.package import open_package
from gptcore.sampling import SamplingParams

READ_SECONDS = 600
"""Without a byte from a service for so long, a request has failed."""

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst"]


@dataclass(frozen=True)
class Load:
    """`concurrency` streams, each of `requests` one after the other; what a turn of any contestant is."""

    package: str
    concurrency: int
    requests: int
    prompt_tokens: int
    new_tokens: int
    """On average: a request asks for half to one and a half times as many, so that streams fall out of step."""
    threads: int
    urls: dict[str, str] = field(default_factory=dict)
    """Where each service listens."""

    def ask(self, turn: int, stream: int, number: int) -> tuple[str, int]:
        """The prompt and the length of one request; no two begin alike, and everyone is asked the same."""
        chooser = random.Random(f"{turn} {stream} {number}")
        prompt = " ".join(chooser.choices(WORDS, k=self.prompt_tokens // 2))  # a word is two tokens of bench.weights
        return prompt, chooser.randint((self.new_tokens + 1) // 2, self.new_tokens * 3 // 2)


@dataclass(frozen=True)
class Reply:
    """One request: when it was sent, when text came, how many tokens, and what went wrong, if anything."""

    sent: float
    arrivals: list[float]
    tokens: int
    error: str = ""


Ask = Callable[[str, int], Awaitable[Reply]]
"""(prompt, tokens) -> what came."""


async def drive(load: Load, turn: int, ask: Ask) -> list[Reply]:
    """One turn of the load."""

    async def stream(number: int) -> list[Reply]:
        return [await ask(*load.ask(turn, number, i)) for i in range(load.requests)]

    replies = await asyncio.gather(*(stream(number) for number in range(load.concurrency)))
    return [reply for one in replies for reply in one]


# --- contestants ------------------------------------------------------------------------------------------------


def open_service(load: Load, precision: str, name: str) -> tuple[Play, str]:
    """A client of the service that listens at `load.urls[name]`; `precision` is what the service was started with."""
    import aiohttp

    url = f"{load.urls[name]}/generate"
    runner = asyncio.Runner()
    turns = iter(range(10**9))

    async def ask(session: Any, prompt: str, tokens: int) -> Reply:
        body = {"prompt": prompt, "max_new_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        sent, arrivals, parts = time.perf_counter(), [], []
        try:
            async with session.post(url, json=body) as response:
                async for part in response.content.iter_any():
                    arrivals.append(time.perf_counter())
                    parts.append(part)
        except aiohttp.ClientError as error:
            return Reply(sent, arrivals, 0, repr(error))
        return read_reply(sent, arrivals, parts, tokens, response.status)

    async def turn() -> list[Reply]:
        patient = aiohttp.ClientTimeout(total=None, sock_read=READ_SECONDS)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=patient) as session:
            return await drive(load, next(turns), functools.partial(ask, session))

    return lambda: runner.run(turn()), url


def read_reply(sent: float, arrivals: list[float], parts: list[bytes], tokens: int, status: int) -> Reply:
    """What an event stream amounts to, once it has ended; anything but `tokens` tokens and [DONE] is an error."""
    text = b"".join(parts)
    if status != 200 or not text.endswith(b"data: [DONE]\n\n"):
        return Reply(sent, arrivals, 0, f"status {status}: {text[-200:]!r}")
    came = json.loads(text.split(b"\n\n")[-3].removeprefix(b"data: "))["usage"]["completion_tokens"]
    # The usage comes after the last text, alone or with it: it is no text.
    times = arrivals[:-1] if len(parts) > 1 and b'"text"' not in parts[-1] else arrivals
    return Reply(sent, times, came, "" if came == tokens else f"{came} tokens came, {tokens} were asked for")


def open_engine(load: Load, precision: str, settings: EngineSettings) -> tuple[Play, str]:
    """The engine in this process, in its thread, asked from an event loop as a service asks it."""
    runner = asyncio.Runner()
    package = open_package(Path(load.package), verify=False)
    engine = AsyncEngine(lambda: Engine(package, settings))
    runner.run(engine.start())
    turns, names = iter(range(10**9)), iter(range(10**9))

    async def ask(prompt: str, tokens: int) -> Reply:
        params = SamplingParams(max_new_tokens=tokens, temperature=0, ignore_eos=True)
        sent, arrivals = time.perf_counter(), []
        request = Request(str(next(names)), engine.engine.encode(prompt), params)
        async for update in engine.generate(request):
            if update.text or update.finish_reason:
                arrivals.append(time.perf_counter())
        error = "" if update.generated_tokens == tokens else f"{update.generated_tokens} of {tokens} tokens came"
        return Reply(sent, arrivals, update.generated_tokens, error)

    return lambda: runner.run(drive(load, next(turns), ask)), f"{engine.info.runner}, {engine.info.dtype}"


# --- figures ----------------------------------------------------------------------------------------------------


def tokens_per_second(replies: Sequence[Reply]) -> float:
    """From the first request of a turn to the last text of it."""
    good = [reply for reply in replies if reply.arrivals]
    if not good:
        return 0.0
    return sum(r.tokens for r in good) / (max(r.arrivals[-1] for r in good) - min(r.sent for r in good))


def first_token_seconds(replies: Sequence[Reply]) -> list[float]:
    """From sending to the first text, of each request."""
    return [reply.arrivals[0] - reply.sent for reply in replies if reply.arrivals]


def figures(turns: Sequence[Sequence[Reply]]) -> dict[str, Any]:
    """Of all the turns of one contestant at one concurrency."""
    replies = [reply for turn in turns for reply in turn]
    gaps = [b - a for r in replies for a, b in zip(r.arrivals, r.arrivals[1:], strict=False)]
    first, errors = first_token_seconds(replies), [reply.error for reply in replies if reply.error]
    rate = statistics.median(map(tokens_per_second, turns))
    tokens = statistics.mean(reply.tokens for reply in replies)
    return {
        "tokens_per_second": round(rate, 1),
        "requests_per_second": round(rate / tokens, 3) if tokens else 0.0,
        "first_token_ms": _percentiles(first),
        "between_tokens_ms": _percentiles(gaps),
        "requests": len(replies),
        "errors": len(errors),
        **({"first_error": errors[0]} if errors else {}),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile, in milliseconds; {} of nothing."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    return {
        "p50": round(statistics.median(ordered) * 1e3, 2),
        "p95": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))] * 1e3, 2),
    }
