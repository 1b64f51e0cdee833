"""The sequences of one order, running on one version of one model.

`generating` leases the model, submits every sequence to the engine and yields a `Generation`, whose updates come as
one stream of (index, Update). The lease lasts until the last token, so a new version cannot unload the model early.
When one sequence fails, the client leaves or the time is up, all sequences of the order are aborted.
"""

import asyncio
import math
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from gptcore.engine import FinishReason, Request, Stream, Update
from gptcore.errors import EngineError, FoundryError
from gptcore.sampling import choice_seed
from serve_app.generation.conversation import Conversation, Encoded
from serve_app.generation.order import Order, check_prompts, encode_prompt, room_for_prompt, within_limits
from serve_app.metrics import SequenceTimer
from serve_app.models.load import ServedModel
from serve_app.state import AppState

SEED_BITS = 32
"""Length of a seed chosen here; every JSON parser reads a number of so many bits exactly."""


class Generation:
    """The running sequences of one order. Iterate it once.

    The j-th continuation of the i-th prompt has index i * n + j.
    """

    def __init__(self, order: Order, served: ServedModel, prompts: Sequence[Encoded]) -> None:
        self.order = order
        self.served = served
        self.id = uuid.uuid4().hex  # not the request's: a client may use that one twice
        self.seed = secrets.randbits(SEED_BITS) if order.params.seed is None else order.params.seed
        self.dropped = sum(prompt.dropped for prompt in prompts)
        """Messages that were left out."""
        self._prompts = [prompt.ids for prompt in prompts]
        self._streams: list[Stream] = []
        self._timers: list[SequenceTimer] = []
        self._latest: list[Update | None] = [None] * order.size

    def submit(self, state: AppState, since: float) -> None:
        """Submit all sequences to the engine; `since` (perf_counter) is when the request came.

        Raises ConfigError, QueueFull or EngineError.
        """
        order, served = self.order, self.served
        interval = state.settings.stream_interval_ms / 1e3 if order.stream else math.inf
        for index in range(order.size):
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
        """The updates as they come, until every sequence has ended. If echoed, the prompt is part of the first update.

        Raises EngineError if a sequence was aborted or failed.
        """
        async for index, update in merged(self._streams):
            self._timers[index].update(update)
            if update.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                raise EngineError(f"sequence {update.request_id} ended in {str(update.finish_reason)!r}")
            if self.order.echo and self._latest[index] is None:
                update = self._with_prompt(index, update)
            self._latest[index] = update
            yield index, update

    def _with_prompt(self, index: int, update: Update) -> Update:
        """`update` with the prompt's text before its own. Tokens that were put before that text have no text."""
        prompt, tokenizer = self.order.prompts[index // self.order.n], self.served.package.tokenizer
        assert not isinstance(prompt, Conversation)  # no route echoes messages
        added = len(tokenizer.bos) if isinstance(prompt, str) and self.order.add_special_tokens else 0
        if not prompt:
            added = len(self._prompts[index // self.order.n])
        logprobs = [*update.prompt_logprobs]
        for place, entry in enumerate(logprobs[: added + 1]):
            content = tokenizer.first_bytes(entry.token_id) if place == added else b""
            logprobs[place] = replace(entry, bytes=tuple(content))
        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        return replace(update, text=text + update.text, prompt_logprobs=tuple(logprobs))

    def usage(self) -> dict[str, Any]:
        """Token counts, once all sequences have ended. A prompt counts once, however many continuations it has."""
        ends, n = [update for update in self._latest if update is not None], self.order.n
        prompt, completion = sum(map(len, self._prompts)), sum(end.generated_tokens for end in ends)
        # Later continuations reuse what the first one cached, so the minimum is what was cached before the request.
        cached = sum(min(end.cached_tokens for end in ends[i : i + n]) for i in range(0, len(ends), n))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def close(self) -> None:
        """Abort the sequences that have not ended."""
        for stream in self._streams:
            await stream.aclose()
        for timer in self._timers:
            timer.close()


async def merged(streams: Sequence[AsyncIterator[Update]]) -> AsyncIterator[tuple[int, Update]]:
    """(index, update) of all streams as they come. Raises the first error that one of them raises."""
    if len(streams) == 1:  # the usual case, without tasks or a queue
        async for update in streams[0]:
            yield 0, update
        return
    # Bounded: while a client reads slowly, updates are merged in the engine's mailboxes instead of piling up here.
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
    """Run the order. When the context is left, what has not ended is aborted and the lease is released.

    Raises ApiError for an unavailable model or an order beyond the service's limits, and whatever the engine raises.
    """
    since = time.perf_counter()
    async with state.models.lease(order.model, request_id) as served:
        order = within_limits(order, served, state.settings)
        context = served.engine.info.context_length
        room = room_for_prompt(order, context, state.settings)
        prompts = [await encode_prompt(served, prompt, order.add_special_tokens, room) for prompt in order.prompts]
        check_prompts(order, [prompt.ids for prompt in prompts], context, state.settings)
        generation = Generation(order, served, prompts)
        try:
            generation.submit(state, since)
            yield generation
        finally:
            await generation.close()
