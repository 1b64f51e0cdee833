"""An HTTP proxy in front of a server, which fails when it is told to."""

import contextlib
import http.client
import itertools
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.ports import free_port

HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
"""Headers that hold for one connection and not behind it."""
READ_SECONDS = 120

Failure = Callable[[BaseHTTPRequestHandler], bool]
"""Answers a request, or does not, and says whether the server is left alone with it."""


class Gate:
    """Passes requests on to a server on this machine, from a port and below a path of its own."""

    def __init__(self, target: int, prefix: str = "") -> None:
        self.target, self.port, self.prefix = target, free_port(), prefix
        self.uri = f"http://127.0.0.1:{self.port}{prefix}"
        self.failure: Failure | None = None
        self.failed = 0
        """Requests that came while the gate was failing."""
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> "Gate":
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @contextlib.contextmanager
    def failing(self, failure: Failure) -> Iterator[None]:
        """Within the block, requests fail in this way."""
        self.failure = failure
        try:
            yield
        finally:
            self.failure = None

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Within the block, connections are refused, and those that are open end at their next request."""
        self._close()
        try:
            with self.failing(cut):
                yield
        finally:
            self._open()

    def _open(self) -> None:
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                failure = gate.failure
                gate.failed += failure is not None
                if not (failure and failure(self)):
                    forward(self, gate.target, self.path.removeprefix(gate.prefix))

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = pass_on

            def log_message(self, *_: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _close(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class Server(ThreadingHTTPServer):
    """Says nothing of clients that were killed."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass


def forward(handler: BaseHTTPRequestHandler, port: int, path: str) -> None:
    """Sends the request on, and the reply back."""
    body = read_body(handler)
    headers = {name: value for name, value in handler.headers.items() if name.lower() not in HOP}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=READ_SECONDS)) as connection:
        try:
            connection.request(handler.command, path, body, headers)
            reply = connection.getresponse()
            content = reply.read()
        except (OSError, http.client.HTTPException):
            handler.close_connection = True
            return
    named = {name.lower(): value for name, value in reply.getheaders()}
    kept = HOP - {"content-length"} if handler.command == "HEAD" else HOP  # there it is the file's
    answer(handler, reply.status, content, {name: value for name, value in named.items() if name not in kept})


def read_body(handler: BaseHTTPRequestHandler) -> bytes | None:
    """The body of a request, of a known length or in chunks."""
    if "chunked" in handler.headers.get("transfer-encoding", ""):
        content = b""
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            content += handler.rfile.read(size)
            handler.rfile.readline()
        handler.rfile.readline()
        return content
    length = int(handler.headers.get("content-length", 0))
    return handler.rfile.read(length) if length else None


def answer(handler: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str]) -> None:
    with contextlib.suppress(OSError):  # the client has left
        handler.send_response_only(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        if handler.command != "HEAD" or "content-length" not in headers:
            handler.send_header("content-length", str(len(content)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content)


# --- failures ---------------------------------------------------------------------------------------------------


PAGE = b"<html><h1>no</h1></html>"


def status(code: int, content: bytes = PAGE, kind: str = "text/html") -> Failure:
    """Answers every request with this status and, if nothing else is given, a page, as a proxy does."""

    def fail(handler: BaseHTTPRequestHandler) -> bool:
        read_body(handler)
        answer(handler, code, content, {"content-type": kind})
        return True

    return fail


def needs(user: str, password: str) -> Failure:
    """Answers 401 to requests without this user's password."""
    right, refuse = "Basic " + b64encode(f"{user}:{password}".encode()).decode(), status(401)
    return lambda handler: handler.headers.get("authorization") != right and refuse(handler)


def cut(handler: BaseHTTPRequestHandler) -> bool:
    """Closes the connection without an answer."""
    handler.close_connection = True
    return True


def garbage(handler: BaseHTTPRequestHandler) -> bool:
    """Answers 200 with bytes that are not what was asked for."""
    read_body(handler)
    answer(handler, 200, bytes(range(256)), {"content-type": "application/json"})
    return True


def slow(seconds: float) -> Failure:
    """Answers late."""

    def wait(handler: BaseHTTPRequestHandler) -> bool:
        time.sleep(seconds)
        return False

    return wait


def every(count: int, failure: Failure) -> Failure:
    """Fails one request of so many."""
    numbers = itertools.count(1)

    def fail(handler: BaseHTTPRequestHandler) -> bool:
        return next(numbers) % count == 0 and failure(handler)

    return fail
