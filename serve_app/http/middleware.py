"""What holds for every request, whatever its route: its id, its log line, its limits, and the form of its failure.

In comes an ASGI app, out comes one wrapped. Each layer is plain ASGI and passes messages on as they come, so that a
stream is never held back. From the outside in: `RequestLog`, CORS if asked for, `ErrorReplies`, `AllowedHosts`, `AllowedOrigins`,
`ApiKeys`, `BodyReader`, `Deadline`. The inner layers raise; `ErrorReplies` answers.
"""

import asyncio
import hashlib
import hmac
import ipaddress
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
from serve_app.http.logs import REQUEST_ID
from serve_app.metrics import Metrics

log = logging.getLogger(__name__)

SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
OPEN_PATHS = ("/", "/health", "/ready", "/metrics", "/docs", "/openapi.json")
"""Served without a key: probes and scrapers carry none, and the pages ask for one themselves."""
OPEN_FOLDER = "/playground/"
SHOWN_ORIGIN = 100
QUIET_PATHS = ("/health", "/ready", "/metrics")
"""Asked every few seconds by machines: logged at debug level while all is well."""
LAST_EVENT_SECONDS = 5.0
"""How long the last event of a stream that failed may take to leave; then the connection is cut."""
MOST_BODIES = 64
"""Whole bodies' worth of memory for bodies that are on their way."""
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class RequestLog:
    """Gives a request its id, its reply x-request-id, the log a line and the metrics a count.

    The id is the client's x-request-id if that is short and plain. It is not put on the reply if `tag` is false, for a
    proxy in front that does so: the reply would have it twice. `x-model-version: <name>/<version>`, set by the
    routes that use a model, is where the labels come from.
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
        status, model, version = 499, "", ""  # until a reply starts: the client has left, as nginx writes it

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
                facts |= {"code": error.code, "param": error.param}  # its message may repeat what the client wrote
            facts["seconds"] = round(time.perf_counter() - started, 4)
            log.log(logging.DEBUG if route in QUIET_PATHS and status < 400 else logging.INFO, "request", extra=facts)
            REQUEST_ID.reset(token)

    def _template(self, scope: Scope) -> str:
        """The route's path as it was declared, also for a request that was refused before it reached the router."""
        if route := scope.get("route"):
            return route.path
        if not self.templates and "app" in scope:
            self.templates = {path: compile_path(path)[0] for path in (*OPEN_PATHS, *scope["app"].openapi()["paths"])}
        path = _path(scope)
        return next((template for template, regex in self.templates.items() if regex.match(path)), "unmatched")


class ErrorReplies:
    """Answers whatever is raised further in: with an error reply or, where a stream has begun, with its last event."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        content_type: str | None = None  # of the reply, once it has begun
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
            # Starlette wraps what its handlers can no longer answer, since the reply has begun.
            wrapped = content_type is not None and type(exc) is RuntimeError and exc.__cause__
            error = to_api_error(exc.__cause__ if wrapped and exc.__cause__ else exc)
            if content_type is None:
                await error_response(error, scope)(scope, receive, send)
            elif content_type.startswith("text/event-stream") and not complete:
                scope.setdefault("state", {})["error"] = error
                event = f"data: {json.dumps(error_body(error))}\n\n".encode()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LAST_EVENT_SECONDS):  # who does not read would keep us here
                        await send({"type": "http.response.body", "body": event, "more_body": False})
            else:
                raise  # the server cuts the connection: what was sent so far must not pass for the whole


class AllowedHosts:
    """Refuses a request that addresses the service by a name that is neither loopback's nor among `allowed`.

    A page whose own name is made to point to 127.0.0.1 (DNS rebinding) is of the service's origin, as browsers see it;
    only the name tells. A request without a Host header is from no browser, and passes.
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
                        f"{name[:SHOWN_ORIGIN]!r} is no name of this service; GPT_ALLOWED_HOSTS says which it has",
                        code="host_not_allowed",
                    )
        await self.app(scope, receive, send)


def host_of(header: str) -> str:
    """The name or address in a Host header, in lower case, without port, brackets and the root's dot."""
    name = header.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] or name
    return name.removesuffix(".")


def is_loopback(name: str) -> bool:
    """Whether a name or address always means the machine itself."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


class AllowedOrigins:
    """Refuses what a browser sends for a page of another origin, unless that is among `allowed` or "*" is.

    CORS alone only hides the answer from such a page: a request that needs no preflight would still be computed.
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
                    f"a page of {origin[:SHOWN_ORIGIN]!r} may not call this service; GPT_CORS_ORIGINS names who may",
                    code="origin_not_allowed",
                )
        await self.app(scope, receive, send)


class ApiKeys:
    """Asks for `Authorization: Bearer <key>` on every path but the open ones. Without keys, everything is open."""

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
        # Digests have one length and every key is compared, so that the time taken says nothing about any of them.
        known = sum(hmac.compare_digest(given, digest) for digest in self.digests)
        if scheme.lower() != "bearer" or not known:
            fault = "the API key is not known" if authorization else "an API key is needed"
            raise ApiError(
                401,
                f"{fault}; send the header Authorization: Bearer <key>",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def _path(scope: Scope) -> str:
    """The path below the prefix that the app is mounted at."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class BodyReader:
    """Reads a request's body whole, within `limit` bytes and `seconds`, and lets through none but sound JSON.

    BodyReader that are on their way take no place in the engines' queue, and together no more memory than `MOST_BODIES`
    whole ones: beyond that, the one that has taken longest is given up. The body is taken for JSON whatever its
    content-type says, since `curl -d` calls it a form.
    """

    def __init__(self, app: ASGIApp, limit: int, seconds: float) -> None:
        self.app = app
        self.limit = limit
        self.seconds = seconds
        self.coming: dict[asyncio.Timeout, int] = {}  # bytes so far, the oldest body first
        self.bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        packing = Headers(scope=scope).get("content-encoding", "identity").strip().lower()
        if packing not in ("", "identity"):
            why = f"content-encoding is {packing[:40]!r}; expected a body as it is, not packed"
            raise ApiError(415, why, code="unsupported_content_encoding")
        timer = asyncio.timeout(self.seconds)
        try:
            async with timer:
                body = await self._read(scope, receive, timer)
        except TimeoutError:
            why = f"the body did not arrive within {self.seconds:g} s, or too many others are as slow"
            raise ApiError(408, why, code="timeout") from None
        finally:
            self.bytes -= self.coming.pop(timer, 0)
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
        """The body, or None if the client left before it was whole."""
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
        """Counts bytes of an unfinished body; gives up the oldest body if all together are too much."""
        self.coming[timer] = self.coming.get(timer, 0) + size
        self.bytes += size
        if self.bytes > MOST_BODIES * self.limit:
            next(iter(self.coming)).reschedule(0)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.limit} bytes, the most accepted", code="body_too_large")


class Deadline:
    """Ends a request `seconds` after its body is there; cancelled, its route aborts its sequences."""

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
    """Refuse what `json.loads` would accept or choke on, and JSON does not have or UTF-8 cannot carry.

    That is invalid UTF-8, NaN and infinities, lone surrogates, integers of thousands of digits, and nesting beyond
    Python's stack. Raises ApiError 400, naming the field where there is one.
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
        raise _bad_json("it has an integer of too many digits") from None
    except RecursionError:
        raise _bad_json("it is nested too deeply") from None
    if suspicious and (fault := next(_faults(value), None)):
        param, what = fault
        raise ApiError(400, f"{param or 'the body'} has {what}", param=param, code="invalid_json")


def _bad_json(what: str) -> ApiError:
    return ApiError(400, f"the body is not JSON: {what}", code="invalid_json")


def _faults(value: Any, field: str | None = None) -> Iterator[tuple[str | None, str]]:
    """(top-level field, what is wrong) for every number and string that JSON cannot hold, without recursion."""
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
