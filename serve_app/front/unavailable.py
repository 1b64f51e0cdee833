"""What a client reads while no replica can answer: 503 in OpenAI's form with Retry-After, whoever in front says so.

In come Ray's own answers, which are plain text; out goes the one form. `middleware` is what Ray's proxy and the HTTP
server of a replica put around themselves (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`); `haproxy.py` has HAProxy say
`BODY`. Nothing is imported here that takes long, since each start of HAProxy would wait for it.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

RETRY_AFTER_SECONDS = 1
OWN_PATHS = "/-/"
"""Of Ray: its health check and its list of routes."""
PROBES = ("/health", "/ready")
PROBE_SECONDS = 3.0
"""How long a probe may wait in Ray's proxy for a replica. Other requests wait as long as the service may take."""
LEAST_STATUS = 404
"""Ray's refusals begin here: no route, a time limit, no place, no replica."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


def error(message: str, code: str, type: str = "server_error") -> str:
    """An error in OpenAI's form, as JSON."""
    return json.dumps({"error": {"message": message, "type": type, "param": None, "code": code}})


BODY = error("the service is starting or coming back; ask again in a moment", "unavailable")
HEADERS = {"content-type": "application/json", "retry-after": str(RETRY_AFTER_SECONDS), "cache-control": "no-store"}


def middleware() -> list[Any]:
    """What Ray is to put around its HTTP servers."""
    from starlette.middleware import Middleware

    return [Middleware(Unavailable)]


class Unavailable:
    """Turns an answer that Ray gives itself, or an app that ends without one, into 503 in OpenAI's form.

    Ray's own answers are plain text; the service's errors are JSON and pass, as does everything below `OWN_PATHS`.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(OWN_PATHS):
            await self.app(scope, receive, send)
            return
        started = replaced = False

        async def truthful(message: Message) -> None:
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
            await self.app(scope, _until(waiting, receive) if waiting else receive, truthful)
        except Exception:
            if started:
                raise  # the server cuts the connection: what was sent so far must not pass for the whole
        finally:
            if waiting:
                waiting.cancel()
        if not started:
            await refuse(send)


def _until(end: asyncio.Task[None], receive: Receive) -> Receive:
    """`receive`, for which the client has left when `end` is done: so Ray ends a request without a word in its log."""

    async def wrapped() -> Message:
        message: asyncio.Future[Message] = asyncio.ensure_future(receive())
        await asyncio.wait((message, end), return_when=asyncio.FIRST_COMPLETED)
        if message.done():
            return message.result()
        message.cancel()
        return {"type": "http.disconnect"}

    return wrapped


async def refuse(send: Send) -> None:
    """Sends the whole answer."""
    body = BODY.encode()
    headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _is_rays(start: Message) -> bool:
    kinds = [value for name, value in start.get("headers", ()) if bytes(name).lower() == b"content-type"]
    return start["status"] >= LEAST_STATUS and (not kinds or bytes(kinds[0]).startswith(b"text/plain"))
