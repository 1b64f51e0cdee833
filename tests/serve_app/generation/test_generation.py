"""From a checked body to the engine: limits, leases, and what happens to sequences when something goes wrong."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from gptcore.engine import Update
from gptcore.errors import EngineError
from serve_app.generation.stream import merged
from serve_app.settings import ServeSettings
from tests.serve_app.conftest import MakePackage
from tests.serve_app.running import Running, running
from tests.waiting import eventually

LENGTH = 4000


@pytest.fixture(scope="module")
def long(make_package: MakePackage) -> str:
    """A model with a context long enough for a request to be abandoned or overtaken before it ends."""
    return f"long={make_package(context_length=LENGTH + 96, hidden_size=256, num_layers=6).path}"


@pytest.fixture(scope="module")
def service(long: str) -> Iterator[Running]:
    settings = ServeSettings(models=(long,), slots=2, max_queue=2, max_prompt_tokens=200, threads=1)
    with running(settings) as service:
        yield service


def endless(**fields: Any) -> dict[str, Any]:
    return {"prompt": "on and on", "max_new_tokens": LENGTH, "ignore_eos": True, **fields}


def idle(service: Running) -> bool:
    return service.leases == 0 and service.stats.running == service.stats.waiting == 0


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"n": 4}], ids=["one", "all-slots", "some-waiting"])
def test_a_client_that_leaves_a_stream_frees_its_slots_and_its_lease(service: Running, fields: dict[str, int]) -> None:
    before = service.stats.generated_tokens_total
    with httpx2.stream("POST", f"{service.url}/generate", json=endless(stream=True, **fields)) as reply:
        lines = reply.iter_lines()  # kept: a reader that is dropped closes the connection
        next(lines)
        assert service.leases == 1
    eventually(lambda: idle(service), "slots and lease are free")
    assert service.stats.generated_tokens_total - before < LENGTH


def test_a_client_that_does_not_wait_for_its_reply_frees_its_slots(service: Running) -> None:
    before = service.stats.generated_tokens_total
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{service.url}/generate", json=endless(n=3), timeout=0.5)
    eventually(lambda: idle(service), "slots and lease are free")
    assert service.stats.generated_tokens_total - before < LENGTH


def test_a_full_queue_is_503_with_retry_after_and_running_requests_continue(service: Running) -> None:
    short = {"prompt": "x", "max_new_tokens": 3, "seed": 1}
    alone = httpx2.post(f"{service.url}/generate", json=short).json()["choices"]
    with httpx2.stream("POST", f"{service.url}/generate", json=endless(stream=True, n=4)) as reply:
        lines = reply.iter_lines()
        next(lines)
        refused = httpx2.post(f"{service.url}/generate", json=short)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert service.leases == 1
        assert next(line for line in lines if line).startswith("data: {")
    eventually(lambda: idle(service), "slots are free")
    assert httpx2.post(f"{service.url}/generate", json=short).json()["choices"] == alone


def test_a_request_that_only_partly_fits_the_queue_leaves_nothing_behind(service: Running) -> None:
    with httpx2.stream("POST", f"{service.url}/generate", json=endless(stream=True)) as reply:
        lines = reply.iter_lines()  # kept: a reader that is dropped closes the connection
        next(lines)
        refused = httpx2.post(f"{service.url}/generate", json=endless(n=4))
        assert (refused.status_code, service.leases) == (503, 1)
        eventually(lambda: service.stats.running + service.stats.waiting == 1, "the part was aborted")
    eventually(lambda: idle(service), "slots are free")


def test_more_sequences_than_the_queue_can_hold_is_a_bad_request(service: Running) -> None:
    body = {"model": "long", "prompt": ["a", "b"], "n": 3}
    refused = httpx2.post(f"{service.url}/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert "4" in refused.json()["error"]["message"]  # two slots, two may wait


def test_a_prompt_over_the_services_limit_is_refused_even_if_the_context_would_hold_it(service: Running) -> None:
    allowed, refused = (
        httpx2.post(f"{service.url}/generate", json={"prompt": "x" * n, "max_new_tokens": 1}) for n in (200, 201)
    )
    assert allowed.status_code == 200
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


def test_a_default_length_is_lowered_to_the_services_limit_and_a_requested_one_is_refused(long: str) -> None:
    with running(ServeSettings(models=(long,), max_new_tokens=5)) as service:
        body = {"prompt": "x", "ignore_eos": True}
        shortened = httpx2.post(f"{service.url}/generate", json=body).json()
        refused = httpx2.post(f"{service.url}/generate", json={**body, "max_new_tokens": 6})
        completion = {**body, "model": "long", "max_tokens": 6}
        named = httpx2.post(f"{service.url}/v1/completions", json=completion)
    assert shortened["usage"]["completion_tokens"] == 5
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_new_tokens")
    assert (named.status_code, named.json()["error"]["param"]) == (400, "max_tokens")


def test_a_request_that_takes_too_long_is_504_and_frees_its_slot(long: str) -> None:
    with running(ServeSettings(models=(long,), request_timeout_s=1.5, threads=1)) as service:
        late = httpx2.post(f"{service.url}/generate", json=endless(), timeout=60)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        with httpx2.stream("POST", f"{service.url}/generate", json=endless(stream=True), timeout=60) as reply:
            *_, last = [line for line in reply.iter_lines() if line]
        assert reply.status_code == 200
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        eventually(lambda: idle(service), "slots and lease are free")


def test_cached_tokens_count_only_what_was_cached_before_the_request(service: Running) -> None:
    body = {"prompt": "never asked before " * 5, "max_new_tokens": 2, "n": 2}
    first, again = (httpx2.post(f"{service.url}/generate", json=body).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert 0 < again["prompt_tokens_details"]["cached_tokens"] < again["prompt_tokens"] == 95


def test_tokens_and_finish_reasons_are_counted_for_prometheus(service: Running) -> None:
    def counted() -> dict[str, float]:
        lines = httpx2.get(f"{service.url}/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = counted()
    fields = {"prompt": "count", "max_new_tokens": 7, "ignore_eos": True, "n": 2}
    reply = httpx2.post(f"{service.url}/generate", json=fields)
    after, (model, version) = counted(), reply.headers["x-model-version"].split("/")
    labels = f'model="{model}",version="{version}"'

    def grown(name: str, labels: str = labels) -> float:
        key = f"gpt_{name}{{{labels}}}"
        return after[key] - before.get(key, 0.0)

    assert grown("generation_tokens_total") == 14
    assert grown("prompt_tokens_total") == 10
    assert grown("time_to_first_token_seconds_count") == 2
    assert grown("inter_token_latency_seconds_count") <= 12  # tokens that came together have no gap before the first
    assert grown("request_success_total", f'finished_reason="length",{labels}') == 2


def test_many_clients_at_once_get_the_same_answers_as_alone(make_package: MakePackage) -> None:
    bodies = [{"prompt": f"{n} bottles", "seed": n, "max_new_tokens": 30, "n": 1 + n % 3} for n in range(12)]
    source = f"tiny={make_package().path}"
    with running(ServeSettings(models=(source,), slots=4, dtype="float32")) as service:

        def ask(body: dict[str, Any]) -> Any:
            return httpx2.post(f"{service.url}/generate", json=body, timeout=60).json()["choices"]

        alone = [ask(body) for body in bodies]
        with ThreadPoolExecutor(len(bodies)) as crowd:
            assert list(crowd.map(ask, bodies)) == alone
        eventually(lambda: idle(service), "slots and leases are free")


def updates(name: str, count: int) -> list[Update]:
    return [Update(name, str(n), (n,), (), None, 1, n + 1, 0) for n in range(count)]


async def stream(items: list[Update], error: Exception | None = None) -> AsyncIterator[Update]:
    for item in items:
        await asyncio.sleep(0)
        yield item
    if error is not None:
        raise error


@pytest.mark.anyio
@pytest.mark.parametrize("count", [1, 5])
async def test_merged_streams_keep_each_ones_order_and_lose_nothing(count: int) -> None:
    sent = [updates(str(index), 20 + index) for index in range(count)]
    got = [pair async for pair in merged([stream(items) for items in sent])]
    assert [[update for at, update in got if at == index] for index in range(count)] == sent


@pytest.mark.anyio
@pytest.mark.parametrize("count", [1, 3])
async def test_merged_streams_raise_the_error_of_any_stream(count: int) -> None:
    died, before = EngineError("died"), asyncio.all_tasks()
    sources = [stream(updates("x", 3), died), *(stream(updates("y", 3)) for _ in range(count - 1))]
    with pytest.raises(EngineError) as caught:
        async for _ in merged(sources):
            pass
    assert caught.value is died
    for _ in range(3):
        await asyncio.sleep(0)  # a cancelled task ends in the loop's next round
    assert asyncio.all_tasks() == before


@pytest.mark.anyio
async def test_the_engine_never_gets_a_request_id_from_a_client(make_package: MakePackage) -> None:
    """Two requests with one x-request-id run side by side."""
    with running(ServeSettings(models=(f"tiny={make_package().path}",))) as service:
        async with httpx2.AsyncClient(base_url=service.url, headers={"x-request-id": "mine"}, timeout=60) as client:
            body = {"prompt": "x", "max_new_tokens": 100, "seed": 1}
            replies = await asyncio.gather(*(client.post("/generate", json=body) for _ in range(4)))
    assert {reply.status_code for reply in replies} == {200}
    assert {reply.headers["x-request-id"] for reply in replies} == {"mine"}
    assert len({reply.json()["id"] for reply in replies}) == 4
