"""Requests from asyncio reach the engine at once, and every reader gets everything or an error."""

import asyncio
import gc
import math
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcore.engine.async_engine import AsyncEngine, Stream
from gptcore.engine.engine import Engine
from gptcore.engine.interface import Chunk, FinishReason, Request
from gptcore.errors import ConfigError, EngineError, QueueFull
from gptcore.sampling import SamplingParams
from tests.waiting import until

from .conftest import Answer, FakeRunner, MakeEngine, ScriptedRunner, alone, run

SECONDS = 20


class GatedRunner(ScriptedRunner):
    """A runner that computes a step only when the test allows it."""

    def __init__(self, script: bytes = b"one, two, three", slots: int = 4) -> None:
        super().__init__(script, slots=slots)
        self.gate = threading.Semaphore(2)  # for the warm-up
        self.failure: Exception | None = None

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        assert self.gate.acquire(timeout=SECONDS)
        if self.failure:
            raise self.failure
        return super().forward(chunks)

    def let(self, steps: int = 10_000) -> None:
        self.gate.release(steps)


def request(name: str = "one", **params: Any) -> Request:
    return Request(name, (97,), SamplingParams(**{"temperature": 0.0, "max_new_tokens": 60, **params}))


def within(work: Coroutine[Any, Any, None]) -> None:
    """Runs a test's coroutine, which must not take long."""
    asyncio.run(asyncio.wait_for(work, SECONDS))


async def read(stream: Stream) -> Answer:
    answer = Answer()
    async for update in stream:
        answer.put(update)
    return answer


@asynccontextmanager
async def started(engine: Engine) -> AsyncIterator[AsyncEngine]:
    """An engine in its thread. It is always closed at the end, after the gate is opened."""
    served = AsyncEngine(lambda: engine)
    await served.start()
    try:
        yield served
    finally:
        if isinstance(engine.runner, GatedRunner):
            engine.runner.let()
        await served.close(drain=False)


def test_many_streams_at_once_give_the_same_texts_as_each_alone(make_engine: MakeEngine) -> None:
    runner = FakeRunner(slots=8)
    requests = [
        Request(f"{i}", tuple(b"begin" * (i % 9 + 1)), SamplingParams(seed=i, max_new_tokens=5 + i)) for i in range(40)
    ]

    async def test() -> None:
        async with started(make_engine(runner, prefill_tokens=32)) as engine:
            answers = await asyncio.gather(*(read(engine.generate(r)) for r in requests))
        for r, answer in zip(requests, answers, strict=True):
            assert answer.tokens == alone(runner, r.prompt, r.params)

    within(test())


def test_streamed_or_not_the_text_is_the_same(make_engine: MakeEngine) -> None:
    script = "süß, 日本 and a stop: end.".encode()
    expected = run(make_engine(ScriptedRunner(script)), request(stop=("end",)))["one"]

    async def test() -> None:
        async with started(make_engine(ScriptedRunner(script))) as engine:
            streamed = await read(engine.generate(request(stop=("end",))))
            assert (streamed.text, streamed.tokens, streamed.reason) == (expected.text, expected.tokens, "stop")

    within(test())


def test_a_slow_reader_gets_everything_in_one_update(make_engine: MakeEngine) -> None:
    async def test() -> None:
        async with started(make_engine(ScriptedRunner(b"one, two, three"))) as engine:
            slow = engine.generate(request("slow", logprobs=0))
            await read(engine.generate(request("quick")))  # came later, so the first has ended too
            (update,) = [update async for update in slow]
            assert (update.text, update.finish_reason) == ("one, two, three", "stop")
            assert bytes(update.token_ids[:-1]) == b"one, two, three"
            assert [entry.token_id for entry in update.logprobs] == list(update.token_ids)

    within(test())


def test_a_reader_is_woken_no_more_often_than_it_asked(
    make_engine: MakeEngine,
) -> None:
    async def test() -> None:
        runner = GatedRunner(b"one, two, three")
        async with started(make_engine(runner)) as engine:
            stream = engine.generate(request(logprobs=0), interval=math.inf)
            runner.let(1)
            first = await anext(stream)
            assert (first.text, first.finish_reason) == ("o", None)
            runner.let()
            (rest,) = [update async for update in stream]
            assert (rest.text, rest.finish_reason, rest.generated_tokens) == ("ne, two, three", "stop", 16)
            assert len(rest.logprobs) == 15
            stream = engine.generate(request("two"), interval=1e-9)
            assert (await read(stream)).text == "one, two, three"

    within(test())


def test_the_updates_of_a_step_reach_the_event_loop_together(make_engine: MakeEngine) -> None:
    async def test() -> None:
        runner = GatedRunner(slots=8)
        async with started(make_engine(runner)) as engine:
            loop, calls = asyncio.get_running_loop(), 0
            call = loop.call_soon_threadsafe

            def counted(*args: Any, **more: Any) -> asyncio.Handle:
                nonlocal calls
                calls += 1
                return call(*args, **more)

            loop.call_soon_threadsafe = counted  # type: ignore[assignment]
            streams = [engine.generate(request(f"{i}")) for i in range(8)]
            runner.let()
            await asyncio.gather(*map(read, streams))
            assert calls == engine.stats().steps_total < 8 * 16

    within(test())


@pytest.mark.parametrize("how", ["closed", "dropped", "cancelled"])
def test_a_reader_that_leaves_frees_the_slot(make_engine: MakeEngine, how: str) -> None:
    async def leave(engine: AsyncEngine) -> None:
        stream = engine.generate(request())
        assert (await anext(stream)).text == "o"
        if how == "closed":
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        elif how == "cancelled":
            reader = asyncio.create_task(read(stream))
            await asyncio.sleep(0)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def test() -> None:
        runner = GatedRunner()
        async with started(make_engine(runner)) as engine:
            runner.let(1)
            await leave(engine)
            gc.collect()
            runner.let(2)  # the step that is waiting already, and one more at most
            await until(lambda: engine.stats().slots_used == 0)
            assert engine.stats().generated_tokens_total <= 3
            runner.let()
            assert (await read(engine.generate(request("next")))).text == "one, two, three"

    within(test())


def test_closing_a_finished_stream_does_not_end_a_newer_one_with_the_same_id(make_engine: MakeEngine) -> None:
    async def test() -> None:
        async with started(make_engine(ScriptedRunner(b"fine"))) as engine:
            unread = engine.generate(request("one"))
            await read(engine.generate(request("two")))
            again = engine.generate(request("one"))
            await unread.aclose()
            assert (await read(again)).text == "fine"

    within(test())


def test_when_the_engine_dies_every_reader_gets_the_error_and_new_requests_are_refused(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        runner = GatedRunner(slots=1)
        async with started(make_engine(runner)) as engine:
            streams = [engine.generate(request(f"{i}")) for i in range(3)]
            runner.let(1)
            first = await anext(streams[0])
            runner.failure = MemoryError("no memory left")
            runner.let()
            ends = [[update async for update in stream][-1] for stream in streams]
            assert [end.finish_reason for end in ends] == ["error"] * 3
            assert (ends[0].text, ends[0].generated_tokens, first.generated_tokens) == ("", 1, 1)
            assert not engine.alive
            with pytest.raises(EngineError, match="no memory left"):
                engine.generate(request("late"))
            assert runner.closed

    within(test())
    assert "no memory left" in caplog.text


def test_a_slow_reader_gets_all_guesses_in_one_update_and_none_twice(make_engine: MakeEngine) -> None:
    async def test() -> None:
        runner = GatedRunner(b"over and " * 12)
        engine = make_engine(runner)
        async with started(engine) as served:
            stream = served.generate(request(max_new_tokens=90), math.inf)
            runner.let(20)
            await until(lambda: engine.stats().accepted_tokens_total > 10)
            runner.failure = MemoryError("no memory left")
            runner.let()
            updates = [update async for update in stream]
        assert sum(update.draft_tokens for update in updates) == engine.stats().draft_tokens_total
        assert sum(update.accepted_tokens for update in updates) == engine.stats().accepted_tokens_total
        assert sum(len(update.token_ids) for update in updates) == engine.stats().generated_tokens_total

    within(test())


def test_start_raises_the_error_of_the_factory() -> None:
    def factory() -> Engine:
        raise ConfigError("no such model")

    async def test() -> None:
        engine = AsyncEngine(factory)
        with pytest.raises(EngineError, match="not been started"):
            engine.generate(request())
        with pytest.raises(ConfigError, match="no such model"):
            await engine.start()
        assert not engine.alive
        await engine.close()

    within(test())


def test_a_model_that_fails_its_warm_up_is_freed(make_engine: MakeEngine) -> None:
    async def test() -> None:
        runner = FakeRunner()
        runner._logits[:] = torch.nan
        with pytest.raises(EngineError, match="are not finite"):
            await AsyncEngine(lambda: make_engine(runner)).start()
        assert runner.closed

    within(test())


@pytest.mark.parametrize(("drain", "reason"), [(True, FinishReason.STOP), (False, FinishReason.ABORT)])
def test_closing_finishes_or_aborts_running_and_waiting_requests(
    make_engine: MakeEngine, drain: bool, reason: FinishReason
) -> None:
    async def test() -> None:
        runner = GatedRunner(slots=1)
        async with started(make_engine(runner)) as engine:
            streams = [engine.generate(request(f"{i}")) for i in range(3)]
            runner.let(1)
            await anext(streams[0])
            closing = asyncio.create_task(engine.close(drain))
            await asyncio.sleep(0)
            with pytest.raises(EngineError, match="closed"):
                engine.generate(request("late"))
            runner.let()
            ends = [[update async for update in stream][-1] for stream in streams]
            assert [end.finish_reason for end in ends] == [reason] * 3
            await closing
            assert runner.closed
            assert engine.stats().slots_used == 0

    within(test())


def test_an_invalid_request_is_refused_at_the_call(make_engine: MakeEngine) -> None:
    async def test() -> None:
        runner = GatedRunner(slots=2)
        async with started(make_engine(runner, max_queue=3)) as engine:
            with pytest.raises(ConfigError, match="empty"):
                engine.generate(Request("empty", (), SamplingParams()))
            streams = [engine.generate(request(f"{i}")) for i in range(5)]
            with pytest.raises(QueueFull, match="5 requests are open"):
                engine.generate(request("5"))
            runner.let()
            assert (await read(streams[0])).text == "one, two, three"
            open_again = engine.generate(request("5"))
            with pytest.raises(ConfigError, match="'5' is in use") as caught:
                engine.generate(request("5"))
            assert caught.value.param == "request_id"
            assert [(await read(stream)).text for stream in [*streams[1:], open_again]] == ["one, two, three"] * 5

    within(test())


def test_an_idle_engine_checks_its_state_and_sleeps(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("check", "step"):
        method = getattr(Engine, name)
        monkeypatch.setattr(Engine, name, lambda self, name=name, method=method: (calls.append(name), method(self))[1])

    async def test() -> None:
        async with started(make_engine(ScriptedRunner(b"fine"))) as engine:
            await read(engine.generate(request()))
            await until(lambda: calls[-1] == "check")
            assert calls.count("check") == 2  # before the first request, and after it
            before = list(calls)
            await asyncio.sleep(0.05)
            assert calls == before
            assert "engine" in [thread.name for thread in threading.enumerate()]

    within(test())


def test_an_engine_with_inconsistent_state_dies_before_it_sleeps(make_engine: MakeEngine) -> None:
    async def test() -> None:
        runner = GatedRunner()
        async with started(make_engine(runner)) as engine:
            stream = engine.generate(request())
            await until(lambda: engine.stats().running == 1)
            engine.engine._scheduler.cache._free.pop(3)
            runner.let()
            assert (await read(stream)).text == "one, two, three"
            await until(lambda: not engine.alive)
            with pytest.raises(EngineError, match=r"slots \[3\]"):
                engine.generate(request())

    within(test())


def test_a_closed_event_loop_leaves_no_engine_running(make_engine: MakeEngine) -> None:
    runner = GatedRunner()
    engine = AsyncEngine(lambda: make_engine(runner))

    async def forgetful() -> Stream:
        await engine.start()
        return engine.generate(request())

    stream = asyncio.run(forgetful())
    runner.let()
    engine._thread.join(SECONDS)
    assert runner.closed
    del stream


def test_the_engines_info_and_stats_can_be_read(make_engine: MakeEngine) -> None:
    async def test() -> None:
        async with started(make_engine(FakeRunner(slots=3))) as engine:
            assert (engine.info.runner, engine.info.slots, engine.info.dtype) == ("fake", 3, "float32")
            assert engine.package.config.context_length == engine.info.context_length
            await read(engine.generate(request(ignore_eos=True, max_new_tokens=7)))
            assert engine.stats().generated_tokens_total == 7

    within(test())
