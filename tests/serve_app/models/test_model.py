"""serve_app.models.follow: who waits for a load, what is tried again and when, and how a service closes."""

import asyncio
import math
import threading
from pathlib import Path

import pytest

from gptcore.engine import EngineSettings, runners
from gptcore.engine.engine import Engine
from gptcore.errors import HubError, NoMemory, PackageError, QueueFull
from gptcore.package import Package, save_package
from serve_app.errors import ApiError, to_api_error
from serve_app.models.catalog import Models
from serve_app.models.follow import LONGEST_BACKOFF_S, refusal
from tests.serve_app.conftest import MakePackage, TestRegistry
from tests.serve_app.models.test_models import ask, running, settings, status
from tests.waiting import until

pytestmark = pytest.mark.anyio


class Gate:
    """Makes real engines. All but the first wait until `open` is set."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.made = 0

    def __call__(self, package: Package, told: EngineSettings) -> Engine:
        self.made += 1
        if self.made > 1:
            self.open.wait(30)
        return Engine(package, told)


@pytest.mark.parametrize("error", [HubError("away"), NoMemory("not now"), MemoryError(), RuntimeError("a driver's")])
def test_the_wait_between_attempts_doubles_up_to_a_limit(error: Exception):
    known, waits = None, []
    for _ in range(2000):
        known = refusal(error, known, first_wait=5.0)
        waits.append(known.wait)
    assert waits[:4] == [5, 10, 20, 40]
    assert waits[-1] == max(waits) == LONGEST_BACKOFF_S


def test_damaged_files_are_not_tried_again():
    assert refusal(PackageError("altered"), None, first_wait=5.0).retry_at == math.inf


async def test_a_model_that_lacked_memory_loads_once_there_is_enough(package: Package, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as short:
        short.setattr(runners, "free_memory", lambda device: 0)
        models = Models(settings(model=str(package.path), poll_seconds=0.01))
        await models.start()
        assert "0 MiB of memory are free" in (models.describe()[0].error or "")
    async with asyncio.timeout(30):
        while not models.ready:
            await models.poll()
    assert (await ask(models))[1]
    assert models.describe()[0].refused == {}
    await models.close()


async def test_only_as_many_requests_wait_for_a_load_as_the_engine_can_queue(make_package: MakePackage):
    said = f"first={make_package(0).path},second={make_package(1).path}"
    gate = Gate()
    async with running(settings(models=said, slots=2, max_queue=1), make_engine=gate) as models:
        early = [asyncio.create_task(ask(models, "second")) for _ in range(3)]
        await until(lambda: status(models, "second").state == "loading")
        with pytest.raises(QueueFull, match="3 requests wait for the model 'second' to load") as caught:
            await ask(models, "second")
        answer = to_api_error(caught.value)
        assert (answer.status, answer.code) == (503, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        early.pop().cancel()  # whose place is free then
        await asyncio.sleep(0)
        early.append(asyncio.create_task(ask(models, "second")))
        await asyncio.sleep(0)
        assert not early[-1].done()
        gate.open.set()
        assert all(text for _, text in await asyncio.gather(*early))


async def test_a_model_that_is_also_the_canary_answers_after_its_alias_is_deleted(registry: TestRegistry):
    for name in ("kept", "second"):
        registry.publish(name)
    said = dict(models="kept=models:/kept@champion,second=models:/second@champion")
    for canary in ("kept:0.5", "second:0.5", "models:/second@champion:0.5"):
        for name in ("kept", "second"):
            registry.point(name, "1")
        async with running(settings(registry.uri, **said, canary=canary, eager="all")) as models:
            for name in ("kept", "second"):
                registry.client.delete_registered_model_alias(name, "champion")
            await models.poll()
            for name in ("kept", "second"):
                assert (await ask(models, name))[1]
                assert "has the alias 'champion'" in (status(models, name).error or "")


async def test_a_package_without_a_score_is_served(make_package: MakePackage, tmp_path: Path):
    source = make_package()
    weights = source.load_model().state_dict()
    save_package(tmp_path / "unknown", source.config, weights, source.tokenizer, {"bits_per_byte": None})
    async with running(settings(model=str(tmp_path / "unknown"))) as models:
        assert (await ask(models))[1]
        assert status(models, "unknown").bits_per_byte is None


async def test_a_request_that_waits_for_a_load_is_refused_when_the_service_closes(make_package: MakePackage):
    said = f"first={make_package(0).path},second={make_package(1).path}"
    gate = Gate()
    models = Models(settings(models=said), make_engine=gate)
    await models.start()
    waiting = asyncio.create_task(ask(models, "second"))
    await until(lambda: status(models, "second").state == "loading")
    closing = asyncio.create_task(models.close())
    gate.open.set()
    with pytest.raises(ApiError, match="the service is closing"):
        await waiting
    await closing
    assert models.loaded() == []


async def test_a_load_cancelled_before_it_began_does_not_block_the_next(package: Package):
    models = Models(settings(models=f"late={package.path}"))
    waiting = asyncio.create_task(ask(models))
    await models.close()  # has its turn right after the request, before the load that the request asked for
    for request in (waiting, ask(models)):
        with pytest.raises(ApiError, match="'late' is not ready: the service is closing"):
            await request
    assert status(models, "late").state == "failed"
