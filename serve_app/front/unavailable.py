"""The reply while no replica can answer: 503 in OpenAI's form with Retry-After, instead of Ray's plain text.

`middleware` wraps Ray's proxy and the HTTP server of a replica (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`);
`haproxy.py` configures HAProxy to send `BODY`. Imports here must be fast, since each start of HAProxy waits for them.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

RETRY_AFTER_SECONDS = 1
OWN_PATHS = "/-/"
"""Ray's own routes: its health check and its list of routes."""
PROBES = ("/health", "/ready")
PROBE_SECONDS = 3.0
"""How long a probe may wait in Ray's proxy for a replica. Other requests wait up to the service's time limit."""
LEAST_STATUS = 404
"""Ray's own errors start here: no route, timeout, queue full, no replica."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


def error(message: str, code: str, type: str = "server_error") -> str:
    """An error in OpenAI's form, as JSON."""
    return json.dumps({"error": {"message": message, "type": type, "param": None, "code": code}})


BODY = error("the service is starting or restarting; try again in a moment", "unavailable")
HEADERS = {"content-type": "application/json", "retry-after": str(RETRY_AFTER_SECONDS), "cache-control": "no-store"}


def middleware() -> list[Any]:
    """The middleware for Ray's HTTP servers."""
    from starlette.middleware import Middleware

    return [Middleware(Unavailable)]


class Unavailable:
    """Turns Ray's own error replies, and apps that end without a reply, into 503 in OpenAI's form.

    Ray's replies are plain text. The service's JSON errors pass unchanged, as does everything below `OWN_PATHS`.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(OWN_PATHS):
            await self.app(scope, receive, send)
            return
        started = replaced = False

        async def send_replaced(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start" and not started:
                started, replaced = True, _is_rays(message)
                if replaced:
                    await refuse(send)
            if not replaced:
                await send(message)

        async def give_up() -> None:
            nonlocal started, replaced
            await asyncio.sleep(PROBE_SECONDS)
            if not started:
                started = replaced = True
                await refuse(send)

        waiting = asyncio.create_task(give_up()) if scope["path"] in PROBES else None
        try:
            await self.app(scope, _until(waiting, receive) if waiting else receive, send_replaced)
        except Exception:
            if started:
                raise  # the server closes the connection, so that a partial reply does not look complete
        finally:
            if waiting:
                waiting.cancel()
        if not started:
            await refuse(send)


def _until(end: asyncio.Task[None], receive: Receive) -> Receive:
    """`receive` that reports a disconnect when `end` is done, so that Ray ends the request without logging an error."""

    async def wrapped() -> Message:
        message: asyncio.Future[Message] = asyncio.ensure_future(receive())
        await asyncio.wait((message, end), return_when=asyncio.FIRST_COMPLETED)
        if message.done():
            return message.result()
        message.cancel()
        return {"type": "http.disconnect"}

    return wrapped


async def refuse(send: Send) -> None:
    """Send the whole reply."""
    body = BODY.encode()
    headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _is_rays(start: Message) -> bool:
    kinds = [value for name, value in start.get("headers", ()) if bytes(name).lower() == b"content-type"]
    return start["status"] >= LEAST_STATUS and (not kinds or bytes(kinds[0]).startswith(b"text/plain"))
