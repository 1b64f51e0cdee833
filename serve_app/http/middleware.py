"""Middleware for every route: request ids, logging, access, limits and error replies.

Each layer is plain ASGI and passes messages on as they come, so streams are not buffered. From the outside in:
`RequestLog`, CORS if configured, `ErrorReplies`, `AllowedHosts`, `AllowedOrigins`, `ApiKeys`, `BodyReader`,
`Deadline`. Inner layers raise; `ErrorReplies` sends the error.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import ApiError, error_body, error_response, to_api_error
from serve_app.http.hosts import host_of, is_loopback
from serve_app.http.logs import REQUEST_ID
from serve_app.metrics import Metrics

log = logging.getLogger(__name__)

SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
OPEN_PATHS = ("/", "/health", "/ready", "/metrics", "/docs", "/openapi.json")
"""Open without a key: probes and scrapers have none, and the web pages ask for one themselves."""
OPEN_FOLDER = "/playground/"
SHOWN_ORIGIN = 100
QUIET_PATHS = ("/health", "/ready", "/metrics")
"""Polled every few seconds by monitoring: successful requests are logged at debug level."""
LAST_EVENT_SECONDS = 5.0
"""Time limit for sending the last event of a failed stream; then the connection is closed."""
MOST_BODIES = 64
"""Memory limit for unfinished bodies, in bodies of the largest allowed size."""
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class RequestLog:
    """Assigns a request id, returns it as x-request-id, and logs and counts the request.

    The id is the client's x-request-id if that is short and plain. If `tag` is false, the reply does not get it, since
    a proxy in front adds it. The metrics' labels come from the reply's `x-model-version: <name>/<version>`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tag: bool = True) -> None:
        self.app = app
        self.metrics = metrics
        self.tag = tag
        self.templates: dict[str, re.Pattern[str]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        token = REQUEST_ID.set(request_id)
        started = time.perf_counter()
        status, model, version = 499, "", ""  # until a reply starts; 499 is nginx's code for a client that left

        async def tagged(message: Message) -> None:
            nonlocal status, model, version
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if self.tag:
                    headers["x-request-id"] = request_id
                model, _, version = headers.get("x-model-version", "").rpartition("/")
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, tagged)
        finally:
            route = self._template(scope)
            self.metrics.request(route, status, model, version)
            facts = {"method": scope["method"], "route": route, "status": status, "model": model, "version": version}
            if error := scope["state"].get("error"):
                facts |= {"code": error.code, "param": error.param}  # not the message, which may quote the client
            facts["seconds"] = round(time.perf_counter() - started, 4)
            log.log(logging.DEBUG if route in QUIET_PATHS and status < 400 else logging.INFO, "request", extra=facts)
            REQUEST_ID.reset(token)

    def _template(self, scope: Scope) -> str:
        """The declared path of the route, even for a request refused before it reached the router."""
        if route := scope.get("route"):
            return route.path
        if not self.templates and "app" in scope:
            self.templates = {path: compile_path(path)[0] for path in (*OPEN_PATHS, *scope["app"].openapi()["paths"])}
        path = _path(scope)
        return next((template for template, regex in self.templates.items() if regex.match(path)), "unmatched")


class ErrorReplies:
    """Turns exceptions into an error reply or, if a stream has started, into its last event."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        content_type: str | None = None  # of the reply, once it has started
        complete = False

        async def watched(message: Message) -> None:
            nonlocal content_type, complete
            if message["type"] == "http.response.start":
                content_type = Headers(raw=message["headers"]).get("content-type", "")
            elif message["type"] == "http.response.body":
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as exc:
            # Starlette wraps exceptions that come after the reply has started.
            wrapped = content_type is not None and type(exc) is RuntimeError and exc.__cause__
            error = to_api_error(exc.__cause__ if wrapped and exc.__cause__ else exc)
            if content_type is None:
                await error_response(error, scope)(scope, receive, send)
            elif content_type.startswith("text/event-stream") and not complete:
                scope.setdefault("state", {})["error"] = error
                event = f"data: {json.dumps(error_body(error))}\n\n".encode()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LAST_EVENT_SECONDS):  # the client may not be reading
                        await send({"type": "http.response.body", "body": event, "more_body": False})
            else:
                raise  # the server closes the connection, so that a partial reply does not look complete


class AllowedHosts:
    """Refuses requests whose Host header is neither a loopback name nor in `allowed`.

    To a browser, a page whose host name is rebound to 127.0.0.1 (DNS rebinding) has the service's origin; only the
    name differs. A request without a Host header does not come from a browser and passes.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self.app = app
        self.allowed = frozenset(name.lower() for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "*" not in self.allowed:
            for given in Headers(scope=scope).getlist("host"):
                name = host_of(given)
                if name and name not in self.allowed and not is_loopback(name):
                    raise ApiError(
                        403,
                        f"the host name {name[:SHOWN_ORIGIN]!r} is not allowed; see GPT_ALLOWED_HOSTS",
                        code="host_not_allowed",
                    )
        await self.app(scope, receive, send)


class AllowedOrigins:
    """Refuses requests from pages of other origins, unless `allowed` has the origin or "*".

    CORS only hides the reply from such a page: a request without preflight would still be computed.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self.app = app
        self.allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "*" not in self.allowed:
            headers = Headers(scope=scope)
            origin = headers.get("origin", "")
            if origin and origin not in self.allowed and origin.partition("://")[2] != headers.get("host"):
                raise ApiError(
                    403,
                    f"pages of {origin[:SHOWN_ORIGIN]!r} may not call this service; see GPT_CORS_ORIGINS",
                    code="origin_not_allowed",
                )
        await self.app(scope, receive, send)


class ApiKeys:
    """Requires `Authorization: Bearer <key>` except on open paths. Without configured keys, everything is open."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self.digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.digests and not self._open(_path(scope)):
            self._check(Headers(scope=scope).get("authorization", ""))
        await self.app(scope, receive, send)

    def _open(self, path: str) -> bool:
        return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)

    def _check(self, authorization: str) -> None:
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip().encode("latin-1"))
        # Equal-length digests, and every key is compared, so the time taken reveals nothing about the keys.
        known = sum(hmac.compare_digest(given, digest) for digest in self.digests)
        if scheme.lower() != "bearer" or not known:
            fault = "the API key is unknown" if authorization else "an API key is needed"
            raise ApiError(
                401,
                f"{fault}; send the header Authorization: Bearer <key>",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def _path(scope: Scope) -> str:
    """The path below the app's mount point."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class BodyReader:
    """Reads the whole body, within `limit` bytes and `seconds`, and accepts valid JSON only.

    Unfinished bodies take no place in the engines' queue, and together no more memory than `MOST_BODIES` full ones:
    beyond that, the oldest one is dropped. The content-type is ignored, since `curl -d` sends that of a form.
    """

    def __init__(self, app: ASGIApp, limit: int, seconds: float) -> None:
        self.app = app
        self.limit = limit
        self.seconds = seconds
        self.unfinished: dict[asyncio.Timeout, int] = {}  # bytes so far, the oldest body first
        self.bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        packing = Headers(scope=scope).get("content-encoding", "identity").strip().lower()
        if packing not in ("", "identity"):
            why = f"content-encoding is {packing[:40]!r}; expected an uncompressed body"
            raise ApiError(415, why, code="unsupported_content_encoding")
        timer = asyncio.timeout(self.seconds)
        try:
            async with timer:
                body = await self._read(scope, receive, timer)
        except TimeoutError:
            why = f"the body did not arrive within {self.seconds:g} s, or too many other bodies are arriving slowly"
            raise ApiError(408, why, code="timeout") from None
        finally:
            self.bytes -= self.unfinished.pop(timer, 0)
        if body is None:
            return
        if body:
            check_json(body)
            MutableHeaders(scope=scope)["content-type"] = "application/json"
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self.app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive, timer: asyncio.Timeout) -> bytes | None:
        """The body, or None if the client left before it was complete."""
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > self.limit:
            raise self._too_large()
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self.limit:
                raise self._too_large()
            parts.append(part)
            more = message.get("more_body", False)
            self._hold(timer, len(part))
        return b"".join(parts)

    def _hold(self, timer: asyncio.Timeout, size: int) -> None:
        """Count bytes of an unfinished body; drop the oldest body if all of them together are too large."""
        self.unfinished[timer] = self.unfinished.get(timer, 0) + size
        self.bytes += size
        if self.bytes > MOST_BODIES * self.limit:
            next(iter(self.unfinished)).reschedule(0)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.limit} bytes, the limit", code="body_too_large")


class Deadline:
    """Cancels a request `seconds` after its body has arrived; its route then aborts its sequences."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        timer = asyncio.timeout(self.seconds)
        try:
            async with timer:
                await self.app(scope, receive, send)
        except TimeoutError:
            if not timer.expired():
                raise
            raise ApiError(504, f"the request took longer than {self.seconds:g} s", code="timeout") from None


def check_json(body: bytes) -> None:
    """Refuse what `json.loads` accepts but JSON or UTF-8 does not allow, and what would crash it.

    That is invalid UTF-8, NaN and infinities, lone surrogates, integers with thousands of digits, and nesting beyond
    Python's stack. Raises ApiError 400, naming the field if there is one.
    """
    suspicious = SURROGATE_ESCAPE.search(body) is not None

    def constant(name: str) -> float:
        nonlocal suspicious
        suspicious = True
        return math.nan

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=constant)
    except UnicodeDecodeError as exc:
        raise _bad_json(f"byte {exc.start} is not UTF-8") from None
    except json.JSONDecodeError as exc:
        raise _bad_json(f"{exc.msg} at line {exc.lineno}, column {exc.colno}") from None
    except ValueError:
        raise _bad_json("it has an integer with too many digits") from None
    except RecursionError:
        raise _bad_json("it is nested too deeply") from None
    if suspicious and (fault := next(_faults(value), None)):
        param, what = fault
        raise ApiError(400, f"{param or 'the body'} has {what}", param=param, code="invalid_json")


def _bad_json(what: str) -> ApiError:
    return ApiError(400, f"the body is not JSON: {what}", code="invalid_json")


def _faults(value: Any, field: str | None = None) -> Iterator[tuple[str | None, str]]:
    """(top-level field, error) for every number and string that JSON cannot represent; not recursive."""
    stack = [(field, value)]
    while stack:
        field, value = stack.pop()
        if isinstance(value, dict):
            stack += [(field, key) for key in value]
            stack += [(field or key, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            stack += [(field, inner) for inner in value]
        elif isinstance(value, float) and not math.isfinite(value):
            yield field, "a number that is not finite"
        elif isinstance(value, str) and not _encodable(value):
            yield field, "a lone surrogate, half of a character"


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
