"""The load of `bench.serve`: several streams at once. Each sends its next request as soon as the last is answered.

The same prompts go to a service over HTTP, or directly to an engine in the client's process. The result is the time at
which each piece of text arrived. The client shares the machine with what it measures, so it parses nothing until the
answer is complete.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.turns import RunTurn
from gptcore.engine import EngineSettings, Request
from gptcore.engine.async_engine import AsyncEngine
from gptcore.engine.engine import Engine
from gptcore.package import open_package
from gptcore.sampling import SamplingParams

READ_SECONDS = 600
"""A request fails if the service sends nothing for this long."""

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst"]


@dataclass(frozen=True)
class Load:
    """One turn of any contestant: `concurrency` streams, each of which sends `requests`, one after the other."""

    package: str
    concurrency: int
    requests: int
    prompt_tokens: int
    new_tokens: int
    """The average. A request asks for half to one and a half times as many, so streams fall out of step."""
    threads: int
    urls: dict[str, str] = field(default_factory=dict)
    """Where each service listens."""

    def ask(self, turn: int, stream: int, number: int) -> tuple[str, int]:
        """The prompt and the length of one request. No two prompts begin alike. All contestants get the same."""
        chooser = random.Random(f"{turn} {stream} {number}")
        prompt = " ".join(chooser.choices(WORDS, k=self.prompt_tokens // 2))  # a word is two tokens of bench.weights
        return prompt, chooser.randint((self.new_tokens + 1) // 2, self.new_tokens * 3 // 2)


@dataclass(frozen=True)
class Reply:
    """The result of one request: when it was sent, when text arrived, how many tokens, and the error, if any."""

    sent: float
    arrivals: list[float]
    tokens: int
    error: str = ""


Ask = Callable[[str, int], Awaitable[Reply]]
"""(prompt, tokens) -> the result of the request."""


async def drive(load: Load, turn: int, ask: Ask) -> list[Reply]:
    """Runs one turn of the load."""

    async def stream(number: int) -> list[Reply]:
        return [await ask(*load.ask(turn, number, i)) for i in range(load.requests)]

    replies = await asyncio.gather(*(stream(number) for number in range(load.concurrency)))
    return [reply for one in replies for reply in one]


# --- contestants ------------------------------------------------------------------------------------------------


def open_service(load: Load, precision: str, name: str) -> tuple[RunTurn, str]:
    """Opens a client of the service at `load.urls[name]`. `precision` is the one that the service was started with."""
    url = f"{load.urls[name]}/generate"
    runner = asyncio.Runner()
    turns = iter(range(10**9))

    async def turn() -> list[Reply]:
        async with open_client(url) as ask:
            return await drive(load, next(turns), ask)

    return lambda: runner.run(turn()), url


@asynccontextmanager
async def open_client(url: str) -> AsyncIterator[Ask]:
    """A client that streams texts from the route at `url`, any number at once. A failed request is a `Reply` too."""
    import aiohttp

    patient = aiohttp.ClientTimeout(total=None, sock_read=READ_SECONDS)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=patient) as session:

        async def ask(prompt: str, tokens: int) -> Reply:
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

        yield ask


def read_reply(sent: float, arrivals: list[float], parts: list[bytes], tokens: int, status: int) -> Reply:
    """Reads a complete event stream. It is an error unless it has `tokens` tokens and ends with [DONE]."""
    text = b"".join(parts)
    if status != 200 or not text.endswith(b"data: [DONE]\n\n"):
        return Reply(sent, arrivals, 0, f"status {status}: {text[-200:]!r}")
    came = json.loads(text.split(b"\n\n")[-3].removeprefix(b"data: "))["usage"]["completion_tokens"]
    # The usage follows the last text, in the same part or in its own. A part with only the usage is not text.
    times = arrivals[:-1] if len(parts) > 1 and b'"text"' not in parts[-1] else arrivals
    return Reply(sent, times, came, "" if came == tokens else f"got {came} tokens, asked for {tokens}")


def open_engine(load: Load, precision: str, settings: EngineSettings) -> tuple[RunTurn, str]:
    """Runs the engine in a thread of this process, called from an event loop as a service calls it."""
    runner = asyncio.Runner()
    package = open_package(Path(load.package), verify=False)
    engine = AsyncEngine(lambda: Engine(package, settings))
    runner.run(engine.start())
    turns, names = iter(range(10**9)), iter(range(10**9))

    async def ask(prompt: str, tokens: int) -> Reply:
        params = SamplingParams(max_new_tokens=tokens, temperature=0, ignore_eos=True)
        sent, arrivals = time.perf_counter(), []
        request = Request(str(next(names)), tuple(package.tokenizer.encode(prompt)), params)
        async for update in engine.generate(request):
            if update.text or update.finish_reason:
                arrivals.append(time.perf_counter())
        error = "" if update.generated_tokens == tokens else f"got {update.generated_tokens} tokens, asked for {tokens}"
        return Reply(sent, arrivals, update.generated_tokens, error)

    return lambda: runner.run(drive(load, next(turns), ask)), f"{engine.info.runner}, {engine.info.dtype}"


# --- figures ----------------------------------------------------------------------------------------------------


def tokens_per_second(replies: Sequence[Reply]) -> float:
    """The rate from the first request of a turn to its last text."""
    good = [reply for reply in replies if reply.arrivals]
    if not good:
        return 0.0
    return sum(r.tokens for r in good) / (max(r.arrivals[-1] for r in good) - min(r.sent for r in good))


def first_token_seconds(replies: Sequence[Reply]) -> list[float]:
    """Seconds from sending each request to its first text."""
    return [reply.arrivals[0] - reply.sent for reply in replies if reply.arrivals]


def figures(turns: Sequence[Sequence[Reply]]) -> dict[str, Any]:
    """The figures of one contestant at one concurrency, over all turns."""
    replies = [reply for turn in turns for reply in turn]
    gaps = [b - a for r in replies for a, b in zip(r.arrivals, r.arrivals[1:], strict=False)]
    first, errors = first_token_seconds(replies), [reply.error for reply in replies if reply.error]
    rate = statistics.median(map(tokens_per_second, turns))
    tokens = statistics.mean(reply.tokens for reply in replies)
    return {
        "tokens_per_second": round(rate, 1),
        "requests_per_second": round(rate / tokens, 3) if tokens else 0.0,
        "first_token_ms": percentiles(first),
        "between_tokens_ms": percentiles(gaps),
        "requests": len(replies),
        "errors": len(errors),
        **({"first_error": errors[0]} if errors else {}),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The median, the 95th and 99th percentile and the longest, in milliseconds; {} if there are no values."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    high = {f"p{percent}": ordered[len(ordered) * percent // 100] for percent in (95, 99)}
    found = {"p50": statistics.median(ordered)} | high | {"max": ordered[-1]}
    return {name: round(value * 1e3, 2) for name, value in found.items()}
