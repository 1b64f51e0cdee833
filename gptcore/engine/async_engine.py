"""Runs an engine in its own thread, with an asyncio interface.

The thread receives messages through one queue, on which it sleeps when idle. It returns all updates of a step at once
through `loop.call_soon_threadsafe`. The event loop never waits for a step, and the engine never waits for a reader:
updates that a slow reader has not fetched are merged into one.
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

from gptcore.engine.interface import EngineInfo, EngineStats, FinishReason, Request, Stepped, Update, merge
from gptcore.errors import ConfigError, EngineError, QueueFull
from gptcore.package import Package

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submit:
    """Start this request."""

    request: Request


@dataclass(frozen=True)
class Abort:
    """End this request; its reader is gone."""

    request_id: str


@dataclass(frozen=True)
class Close:
    """Finish the open requests (`drain`) or abort them, then end."""

    drain: bool


Message = Submit | Abort | Close


class Mailbox:
    """The updates of one request that were not fetched yet. Belongs to the event loop's thread.

    The first and last updates wake the reader at once; others wake it at least `interval` seconds after its last fetch.
    """

    def __init__(self, request: Request, interval: float) -> None:
        self.latest = Update(request.request_id, "", (), (), None, len(request.prompt), 0, 0)
        self.arrived = asyncio.Event()
        self._pending: list[Update] = []
        self._interval, self._due = interval, 0.0
        self._timer: asyncio.TimerHandle | None = None

    def put(self, update: Update) -> None:
        """Add an update."""
        self.latest = update
        self._pending.append(update)
        wait = self._due - time.monotonic()
        if update.finish_reason is not None or wait <= 0:
            self.arrived.set()
        elif self._timer is None and wait < math.inf:
            self._timer = asyncio.get_running_loop().call_later(wait, self.arrived.set)

    def fail(self) -> None:
        """Add a last update with the finish reason ERROR."""
        self.put(
            replace(
                self.latest,
                text="",
                token_ids=(),
                logprobs=(),
                prompt_logprobs=(),
                draft_tokens=0,
                accepted_tokens=0,
                finish_reason=FinishReason.ERROR,
            )
        )

    def take(self) -> Update:
        """All updates since the last call, merged. There must be at least one."""
        update = merge(self._pending)
        self._pending = []
        self._due = time.monotonic() + self._interval
        self.arrived.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return update


class Stream:
    """One request's updates, for one reader; the last has a finish reason. Closing or dropping it aborts."""

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
        """End the request if it has not ended; its slot is free at the engine's next step."""
        self._leave()

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        self._ended = True
        if self._mailbox.latest.finish_reason is None:
            self._abort(Abort(self._request_id))  # SimpleQueue.put is safe to call in __del__


class AsyncEngine:
    """An asyncio interface to an engine. Everything here belongs to the event loop that called `start`."""

    def __init__(self, engine_factory: Callable[[], Stepped], name: str = "engine") -> None:
        """`engine_factory` runs in the thread, which is called `name`."""
        self._factory = engine_factory
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._open: dict[str, Mailbox] = {}
        self._engine: Stepped | None = None
        self._error: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    async def start(self) -> None:
        """Start the thread and wait until the engine is warm. Raises what the factory or the warm-up raised."""
        self._loop = asyncio.get_running_loop()
        self._warm = asyncio.Event()
        self._ended = asyncio.Event()
        self._thread.start()
        await self._warm.wait()
        if self._error is not None:
            raise self._error

    @property
    def alive(self) -> bool:
        """Whether it accepts requests: it was started, is not closing, and has not died."""
        engine = self._engine
        return engine is not None and not self._closing and self._error is None and engine.alive

    @property
    def at_work(self) -> bool:
        """Whether its thread is running, which it may be even after a cancelled `start` or `close`."""
        return self._thread.is_alive()

    @property
    def engine(self) -> Stepped:
        """The engine, which other threads may only read. Raises EngineError before `start`."""
        if self._engine is None:
            raise EngineError("the engine has not been started")
        return self._engine

    @property
    def package(self) -> Package:
        """The engine's package."""
        return self.engine.package

    @property
    def info(self) -> EngineInfo:
        """Runner, precision, slots and memory."""
        return self.engine.info

    def stats(self) -> EngineStats:
        """The current counters, without requests that are still in the thread's queue."""
        return self.engine.stats()

    def generate(self, request: Request, interval: float = 0.0) -> Stream:
        """Submit `request` and return the stream of its updates, at least `interval` seconds apart.

        Raises ConfigError for an invalid request, QueueFull if there is no room, and EngineError if the engine has died
        or is closing. If it dies later, the last update's finish reason is "error".
        """
        engine = self.engine
        if not self.alive:
            how = f"died of {self._error!r}" if self._error else "is closed" if self._closing else "has died"
            raise EngineError(f"the engine {how}")
        engine.validate(request)
        # Checked here, since the thread may be busy with a step and a refusal should be immediate.
        if request.request_id in self._open:
            raise ConfigError(f"request id {request.request_id!r} is in use", param="request_id")
        room = engine.info.slots + engine.settings.max_queue
        if len(self._open) >= room:
            raise QueueFull(f"{len(self._open)} requests are open, and no more than {room} may be. Try again later")
        mailbox = self._open[request.request_id] = Mailbox(request, interval)
        self._inbox.put(Submit(request))
        return Stream(request.request_id, mailbox, self._inbox.put)

    async def close(self, drain: bool = True) -> None:
        """Accept no more requests, finish the open ones (`drain`) or abort them, and end the thread."""
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
        """Called when the thread has ended; fails the requests that are still open."""
        for mailbox in self._open.values():
            mailbox.fail()
        self._open.clear()
        self._warm.set()
        self._ended.set()

    # The methods below run in the thread.

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
        except BaseException as error:  # whatever it is, waiting readers must be told
            if self._engine is not None:  # otherwise `start` raises it
                logger.critical("%s died", self._thread.name, exc_info=error)
            self._error = error
        self._post(self._end)

    def _serve(self, engine: Stepped) -> None:
        """Run steps and handle messages until told to close."""
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

    def _handle(self, engine: Stepped, message: Message) -> bool:
        """Handle a message; return whether to close the engine."""
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
        """Schedule `callback` on the event loop; return False if the loop is closed."""
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            return False
        return True
