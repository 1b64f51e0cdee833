"""Ray's proxy and a replica's HTTP server answer in our form and not in Ray's."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import pytest

from serve_app.errors import RETRY_AFTER_SECONDS
from serve_app.front import unavailable
from serve_app.front.unavailable import Unavailable

pytestmark = pytest.mark.anyio

App = Callable[[Any, Any, Any], Awaitable[None]]


def answering(status: int, content_type: str | None, body: bytes = b"x") -> App:
    """An app that always sends this answer, in two pieces."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", content_type.encode())] if content_type else []
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


async def ask(app: App, path: str = "/generate") -> httpx2.Response:
    transport = httpx2.ASGITransport(Unavailable(app))
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.get(path)


def assert_unavailable(reply: httpx2.Response) -> None:
    assert reply.status_code == 503
    assert int(reply.headers["retry-after"]) == RETRY_AFTER_SECONDS == unavailable.RETRY_AFTER_SECONDS
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("server_error", "unavailable", None)


@pytest.mark.parametrize("status", [404, 408, 500, 503])
@pytest.mark.parametrize("content_type", ["text/plain", "text/plain; charset=utf-8", None])
async def test_rays_plain_answers_become_503_in_openais_form(status: int, content_type: str | None):
    assert_unavailable(await ask(answering(status, content_type)))


@pytest.mark.parametrize("status", [200, 400, 404, 500, 503])
async def test_the_apps_own_answers_pass(status: int):
    reply = await ask(answering(status, "application/json", b"{}"))
    assert (reply.status_code, reply.text) == (status, "{}")


async def test_plain_text_without_an_error_status_passes():
    assert (await ask(answering(200, "text/plain", b"figures"))).text == "figures"


async def test_rays_own_routes_pass():
    assert (await ask(answering(503, "text/plain", b"No replicas"), "/-/healthz")).text == "No replicas"


async def test_an_app_that_ends_without_an_answer_is_503():
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        pass

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("the actor died")

    assert_unavailable(await ask(silent))
    assert_unavailable(await ask(failing))


async def test_a_broken_stream_stays_broken():
    async def breaking(scope: Any, receive: Any, send: Any) -> None:
        await answering(200, "text/event-stream")(scope, receive, send)
        raise RuntimeError("the actor died")

    with pytest.raises(RuntimeError):
        await ask(breaking)


async def test_a_probe_waits_for_a_replica_no_longer_than_necessary(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unavailable, "PROBE_SECONDS", 0.01)

    async def waiting(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/generate":
            await asyncio.sleep(0.1)
            await answering(200, "application/json", b"{}")(scope, receive, send)
        while (await receive())["type"] != "http.disconnect":  # as Ray's proxy does
            pass

    assert_unavailable(await ask(waiting, "/ready"))
    assert (await ask(waiting)).status_code == 200


def test_the_middleware_has_the_interface_that_ray_expects():
    from ray.serve._private import http_util

    (one,) = http_util.validate_http_proxy_callback_return(unavailable.middleware())
    assert one.cls is Unavailable
    assert json.loads(unavailable.BODY)["error"]["code"] == "unavailable"
