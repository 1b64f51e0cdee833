"""The engine in a thread of its own, asyncio outside: a request goes in, its updates come out as they are computed.

Messages go to the thread through one queue, on which it sleeps when it has nothing to do. Updates come back once per
step, all together, through `loop.call_soon_threadsafe`. The event loop never waits for a step, and the engine
never waits for a reader: what a slow one has not fetched yet is merged into one update.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Self

from gptcore.engine.engine import Engine, EngineInfo, EngineStats
from gptcore.engine.interface import FinishReason, Request, Update
from gptcore.errors import ConfigError, EngineError, QueueFull
from gptcore.package import Package

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submit:
    """A request for the engine."""

    request: Request


@dataclass(frozen=True)
class Abort:
    """End this request; whoever reads it is gone."""

    request_id: str


@dataclass(frozen=True)
class Close:
    """Finish what there is (`drain`) or abort it, then end."""

    drain: bool


Message = Submit | Abort | Close


def merge(updates: list[Update]) -> Update:
    """Consecutive updates of one request as one."""
    if len(updates) == 1:
        return updates[0]
    return replace(
        updates[-1],
        text="".join(update.text for update in updates),
        token_ids=tuple(token for update in updates for token in update.token_ids),
        logprobs=tuple(entry for update in updates for entry in update.logprobs),
        prompt_logprobs=tuple(entry for update in updates for entry in update.prompt_logprobs),
    )


class Mailbox:
    """What has come for one request and was not fetched yet. Belongs to the event loop's thread.

    The reader is woken for the first update and for the last, and for the others `interval` seconds after it was there
    last or, if none has come by then, for the next.
    """

    def __init__(self, request: Request, interval: float) -> None:
        self.latest = Update(request.request_id, "", (), (), None, len(request.prompt), 0, 0)
        self.arrived = asyncio.Event()
        self._pending: list[Update] = []
        self._interval, self._due = interval, 0.0
        self._timer: asyncio.TimerHandle | None = None

    def put(self, update: Update) -> None:
        """Adds an update."""
        self.latest = update
        self._pending.append(update)
        wait = self._due - time.monotonic()
        if update.finish_reason is not None or wait <= 0:
            self.arrived.set()
        elif self._timer is None and wait < math.inf:
            self._timer = asyncio.get_running_loop().call_later(wait, self.arrived.set)

    def fail(self) -> None:
        """Adds a last update, which says that the engine died."""
        self.put(
            replace(
                self.latest, text="", token_ids=(), logprobs=(), prompt_logprobs=(), finish_reason=FinishReason.ERROR
            )
        )

    def take(self) -> Update:
        """What has come since the last call, as one update. There must be something."""
        update = merge(self._pending)
        self._pending = []
        self._due = time.monotonic() + self._interval
        self.arrived.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return update


class Stream:
    """One request's updates, for one reader; the last has a finish reason. Closed or dropped before, it aborts."""

    def __init__(self, request_id: str, mailbox: Mailbox, abort: Callable[[Abort], None]) -> None:
        self._request_id = request_id
        self._mailbox = mailbox
        self._abort = abort
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Update:
        if self._ended:
            raise StopAsyncIteration
        await self._mailbox.arrived.wait()
        update = self._mailbox.take()
        self._ended = update.finish_reason is not None
        return update

    async def aclose(self) -> None:
        """Ends the request if it has not ended: its slot is free from the engine's next step on."""
        self._leave()

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        self._ended = True
        if self._mailbox.latest.finish_reason is None:
            self._abort(Abort(self._request_id))  # a SimpleQueue's put, which may be called from here


class AsyncEngine:
    """An engine for asyncio. Everything here belongs to the event loop that called `start`."""

    def __init__(self, engine_factory: Callable[[], Engine], name: str = "engine") -> None:
        """`engine_factory` runs inside the thread, which is called `name`."""
        self._factory = engine_factory
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._open: dict[str, Mailbox] = {}
        self._engine: Engine | None = None
        self._error: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    async def start(self) -> None:
        """Returns when the engine is warm. Raises what the factory or the warm-up raised."""
        self._loop = asyncio.get_running_loop()
        self._warm = asyncio.Event()
        self._ended = asyncio.Event()
        self._thread.start()
        await self._warm.wait()
        if self._error is not None:
            raise self._error

    @property
    def alive(self) -> bool:
        """Whether it takes requests: it was started, is not closing, and has not died."""
        return self._engine is not None and not self._closing and self._error is None

    @property
    def at_work(self) -> bool:
        """Whether its thread is there: it may be even if `start` was given up or `close` not waited for."""
        return self._thread.is_alive()

    @property
    def engine(self) -> Engine:
        """The engine itself, of which other threads than its own may only read. Raises EngineError before `start`."""
        if self._engine is None:
            raise EngineError("the engine has not been started")
        return self._engine

    @property
    def package(self) -> Package:
        """The model that it runs."""
        return self.engine.package

    @property
    def info(self) -> EngineInfo:
        """How the model is run: runner, precision, slots, memory."""
        return self.engine.info

    def stats(self) -> EngineStats:
        """Counts as of now, without requests still on their way to the thread."""
        return self.engine.stats()

    def generate(self, request: Request, interval: float = 0.0) -> Stream:
        """Submits `request`, at once, and returns the stream of its updates, `interval` seconds apart or more.

        Raises ConfigError for a request that does not fit the model, QueueFull if as many are open as may be, and
        EngineError if the engine has died or is closing. If it dies later, the last update's finish reason is "error".
        """
        engine = self.engine
        if not self.alive:
            raise EngineError(f"the engine {f'died of {self._error!r}' if self._error else 'is closed'}")
        engine.validate(request)
        # Asked here and not in the thread, which may be busy with a step: a refusal is to come at once.
        if request.request_id in self._open:
            raise ConfigError(f"request id {request.request_id!r} is in use", param="request_id")
        room = engine.info.slots + engine.settings.max_queue
        if len(self._open) >= room:
            raise QueueFull(f"{len(self._open)} requests are open, and no more than {room} may be. Try again later")
        mailbox = self._open[request.request_id] = Mailbox(request, interval)
        self._inbox.put(Submit(request))
        return Stream(request.request_id, mailbox, self._inbox.put)

    async def close(self, drain: bool = True) -> None:
        """Takes no more requests, finishes those there are (`drain`) or aborts them, and ends the thread."""
        self._closing = True
        if self._thread.is_alive():
            self._inbox.put(Close(drain))
            await self._ended.wait()
            self._thread.join()

    def _deliver(self, updates: list[Update]) -> None:
        for update in updates:
            self._open[update.request_id].put(update)
            if update.finish_reason is not None:
                del self._open[update.request_id]

    def _end(self) -> None:
        """The thread has ended. What is open still will get no more updates."""
        for mailbox in self._open.values():
            mailbox.fail()
        self._open.clear()
        self._warm.set()
        self._ended.set()

    # From here on: what runs in the thread.

    def _main(self) -> None:
        try:
            engine = self._factory()
            try:
                engine.warm_up()
                self._engine = engine
                if self._post(self._warm.set):
                    self._serve(engine)
            finally:
                engine.close()
        except BaseException as error:  # whatever it is, whoever waits for an answer is told
            if self._engine is not None:  # else `start` raises it
                logger.critical("%s died", self._thread.name, exc_info=error)
            self._error = error
        self._post(self._end)

    def _serve(self, engine: Engine) -> None:
        """Runs steps and handles messages until one says to end."""
        closing = False
        while engine.busy or not closing:
            if not engine.busy:
                engine.check()
                closing |= self._handle(engine, self._inbox.get())
            while not self._inbox.empty():
                closing |= self._handle(engine, self._inbox.get())
            updates = engine.step()
            if updates and not self._post(self._deliver, updates):
                return

    def _handle(self, engine: Engine, message: Message) -> bool:
        """Does what `message` says; returns whether the engine is to end."""
        match message:
            case Submit(request):
                engine.add(request)
            case Abort(request_id):
                engine.abort(request_id)
            case Close(drain):
                if not drain:
                    engine.abort_all()
                return True
        return False

    def _post(self, callback: Callable[..., object], *args: object) -> bool:
        """Has the event loop call `callback`. False if the loop is closed, so that nobody is left to tell."""
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            return False
        return True
