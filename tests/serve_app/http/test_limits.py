"""Limits on what one client can take from others: bodies, time and places in the queue."""

import asyncio
import gzip
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from typing import Any

import httpx2
import pytest
from starlette.types import Message, Receive, Scope, Send

from serve_app.errors import ApiError
from serve_app.http.middleware import BodyReader, ErrorReplies
from serve_app.settings import ServeSettings
from tests.serve_app.conftest import MakePackage
from tests.serve_app.running import Running, running
from tests.waiting import eventually

LIMIT, SECONDS, BODY_SECONDS = 4000, 4.0, 0.5
SLOTS, QUEUE = 1, 1
LONG = 20_000
"""Tokens that take this model much longer than a request may."""
BODY: dict[str, Any] = dict(prompt="The future of AI is", seed=7, max_new_tokens=4)
ENDLESS: dict[str, Any] = dict(prompt="The", seed=7, max_new_tokens=LONG, ignore_eos=True)


@pytest.fixture(scope="module")
def service(make_package: MakePackage) -> Iterator[Running]:
    """A service with one slot, one place in the queue, and enough seconds per request for a busy machine."""
    package = make_package(hidden_size=256, num_layers=8, num_heads=4, num_kv_heads=1, context_length=LONG + 100)
    settings = ServeSettings(
        models=(f"tiny={package.path}",),
        dtype="float32",
        slots=SLOTS,
        max_queue=QUEUE,
        max_new_tokens=LONG,
        max_body_bytes=LIMIT,
        request_timeout_s=SECONDS,
        body_timeout_s=BODY_SECONDS,
    )
    with running(settings) as service:
        yield service


@pytest.fixture
def client(service: Running) -> Iterator[httpx2.Client]:
    """Checks that no request of a test still runs when the test ends."""
    with httpx2.Client(base_url=service.url, timeout=60) as client:
        yield client
    eventually(lambda: service.leases == 0 and service.stats.slots_used == 0, "slots and leases are given back")


@pytest.fixture
def connection(service: Running) -> Iterator[socket.socket]:
    """A raw connection, for requests that no client library would send."""
    host, port = service.url.removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), timeout=30)) as connection:
        yield connection


def padded(size: int) -> bytes:
    """A valid body of this size in bytes."""
    body = json.dumps(BODY).encode()
    return body + b" " * (size - len(body))


def reply_on(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and error of the reply; the server need not close the connection."""
    received = b""
    while b'"code"' not in received:
        received += (part := connection.recv(65536))
        assert part, received
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def unread(service: Running, body: dict[str, Any]) -> AbstractContextManager[socket.socket]:
    """Sends a request without reading the reply. Closing it means that the client left."""
    content = json.dumps(body).encode()
    host, port = service.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(
        f"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content
    )
    return closing(connection)


def answered(client: httpx2.Client) -> float:
    """The number of generations so far, however they ended."""
    counts = re.findall(r'^gpt_requests_total{.*route="/generate".*} (.+)$', client.get("/metrics").text, re.MULTILINE)
    return sum(map(float, counts))


def assert_unharmed(client: httpx2.Client) -> None:
    assert client.get("/health").status_code == 200
    assert client.post("/generate", json=BODY).status_code == 200


# --- bodies ---


def test_a_body_of_exactly_the_limit_is_accepted(client: httpx2.Client) -> None:
    assert client.post("/generate", content=padded(LIMIT)).status_code == 200


@pytest.mark.parametrize("size", [LIMIT + 1, 10_000_000])
def test_a_larger_body_is_413(client: httpx2.Client, size: int) -> None:
    reply = client.post("/generate", content=padded(size))
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    assert str(LIMIT) in reply.json()["error"]["message"]
    assert_unharmed(client)


def test_a_compressed_body_is_refused(client: httpx2.Client) -> None:
    packed = gzip.compress(json.dumps(BODY).encode())
    reply = client.post("/generate", content=packed, headers={"content-encoding": "gzip"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_content_encoding")
    plain = client.post("/generate", json=BODY, headers={"content-encoding": "identity"})
    assert plain.status_code == 200


def test_a_body_without_a_length_is_counted_as_it_arrives(client: httpx2.Client) -> None:
    def chunks(size: int) -> Iterator[bytes]:
        for begin in range(0, size, 100):
            yield padded(size)[begin : begin + 100]

    assert client.post("/generate", content=chunks(LIMIT)).status_code == 200
    assert client.post("/generate", content=chunks(LIMIT + 1)).status_code == 413
    assert_unharmed(client)


def test_an_endless_body_is_refused_as_soon_as_it_is_too_large(
    client: httpx2.Client, connection: socket.socket
) -> None:
    connection.sendall(b"POST /generate HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(LIMIT // 1000 + 1):
        connection.sendall(b"3e8\r\n" + b" " * 1000 + b"\r\n")
    assert reply_on(connection)[0] == 413
    assert_unharmed(client)


def test_a_declared_length_over_the_limit_is_refused_before_the_body_arrives(
    client: httpx2.Client, connection: socket.socket
) -> None:
    connection.sendall(b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10000000\r\n\r\n")
    assert reply_on(connection)[0] == 413
    assert_unharmed(client)


def test_a_body_that_does_not_arrive_is_408(client: httpx2.Client, connection: socket.socket) -> None:
    connection.sendall(b'POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{"prompt":')
    status, error = reply_on(connection)
    assert (status, error["code"]) == (408, "timeout")
    assert_unharmed(client)


def test_a_body_that_arrives_too_slowly_is_408(client: httpx2.Client, connection: socket.socket) -> None:
    begun = time.monotonic()
    connection.sendall(b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n")
    connection.settimeout(0.05)
    received = b""
    while not received:
        connection.sendall(b" ")
        with suppress(TimeoutError):
            received = connection.recv(65536)
        assert time.monotonic() - begun < 20
    assert received.startswith(b"HTTP/1.1 408 ")
    assert_unharmed(client)


def test_three_hundred_half_sent_bodies_take_no_place_from_other_clients(
    client: httpx2.Client, service: Running
) -> None:
    host, port = service.url.removeprefix("http://").split(":")
    half = b'POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{"prompt":'
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(closing(socket.create_connection((host, int(port)), timeout=30))).sendall(half)
        for _ in range(10):
            assert client.post("/generate", json=BODY).status_code == 200
        eventually(lambda: service.leases == 0, "unfinished bodies hold no model")
    assert_unharmed(client)


@pytest.mark.anyio
async def test_unfinished_bodies_share_a_memory_limit_and_the_oldest_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve_app.http.middleware.MOST_BODIES", 2)
    reached: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope["path"])

    bodies, started = BodyReader(app, limit=10, seconds=60), asyncio.Event()

    async def half_sent(path: str) -> None:
        messages = [{"type": "http.request", "body": b" " * 9, "more_body": True}]

        async def receive() -> Message:
            if not messages:
                started.set()
                await asyncio.Event().wait()
            return messages.pop()

        await bodies({"type": "http", "path": path, "headers": []}, receive, send)

    async def send(message: Message) -> None:
        pass

    async def whole() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    tasks = []
    for path in ("/1", "/2", "/3"):
        started.clear()
        tasks.append(asyncio.create_task(half_sent(path)))
        await asyncio.wait_for(started.wait(), 10)
    with pytest.raises(ApiError, match="arriving slowly"):
        await asyncio.wait_for(tasks[0], 10)
    await bodies({"type": "http", "path": "/whole", "headers": []}, whole, send)
    assert reached == ["/whole"]
    assert not tasks[1].done()
    for task in tasks[1:]:
        task.cancel()
    await asyncio.gather(*tasks[1:], return_exceptions=True)
    assert bodies.bytes == 0


def test_a_client_that_leaves_before_its_body_is_complete_does_no_harm(
    client: httpx2.Client, connection: socket.socket
) -> None:
    connection.sendall(b'POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{"prompt":')
    connection.close()
    assert_unharmed(client)


# --- time ---


LIFTING = {
    "x-request-timeout-seconds": "3600",
    "x-request-timeout": "3600",
    "request-timeout": "3600",
    "timeout": "3600",
    "x-stainless-read-timeout": "3600",
    "x-max-body-bytes": "1000000000",
    "expect-timeout": "3600",
}


@pytest.mark.parametrize("headers", [{}, LIFTING], ids=["plainly", "asking for more"])
def test_a_request_that_takes_too_long_is_504_and_its_slot_is_freed(
    client: httpx2.Client, service: Running, headers: dict[str, str]
) -> None:
    begun = time.monotonic()
    reply = client.post("/generate", json=ENDLESS, headers=headers)
    taken = time.monotonic() - begun
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout"), reply.text
    assert SECONDS <= taken < SECONDS + 5
    eventually(lambda: service.stats.running == 0, "the sequence is aborted")
    assert_unharmed(client)


def test_a_stream_that_takes_too_long_ends_with_an_error_event(client: httpx2.Client, service: Running) -> None:
    with client.stream("POST", "/generate", json={**ENDLESS, "stream": True}) as reply:
        assert reply.status_code == 200
        *texts, last = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert len(texts) > 1
    assert "choices" in json.loads(texts[-1])
    error = json.loads(last)["error"]
    assert (error["type"], error["code"]) == ("server_error", "timeout")
    eventually(lambda: service.stats.running == 0, "the sequence is aborted")
    assert_unharmed(client)


def test_a_client_that_does_not_read_its_stream_frees_everything_at_the_time_limit(
    client: httpx2.Client, service: Running
) -> None:
    before = answered(client)
    with unread(service, {**ENDLESS, "stream": True, "logprobs": 20}):
        eventually(lambda: service.leases == 1, "the request is there")
        eventually(lambda: service.leases == 0 and service.stats.running == 0, "the sequence is aborted")
        eventually(lambda: answered(client) > before, "the request has ended")
    assert_unharmed(client)


@pytest.mark.anyio
async def test_the_last_event_of_a_failed_stream_does_not_wait_for_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.http.middleware.LAST_EVENT_SECONDS", 0.05)

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        raise ApiError(504, "too late")

    async def full(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # as a server's send does while the socket takes no more

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async with asyncio.timeout(10):
        await ErrorReplies(late)({"type": "http"}, receive, full)  # the server cuts a reply that was not finished


@pytest.mark.parametrize("name", LIFTING)
def test_no_header_lifts_the_limit_on_bodies(client: httpx2.Client, name: str) -> None:
    assert client.post("/generate", content=padded(LIMIT + 1), headers={name: LIFTING[name]}).status_code == 413


# --- places ---


def test_with_a_full_queue_a_request_is_503_at_once_with_retry_after(client: httpx2.Client, service: Running) -> None:
    with ExitStack() as open_streams:
        for _ in range(SLOTS + QUEUE):
            open_streams.enter_context(unread(service, {**ENDLESS, "stream": True}))
        eventually(lambda: service.leases == SLOTS + QUEUE, "all places are taken")
        reply = client.post("/generate", json=BODY)
        metrics = client.get("/metrics").text
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "queue_full"), reply.text
    assert int(reply.headers["retry-after"]) >= 1
    assert "gpt_num_requests_running{" in metrics
    eventually(lambda: service.leases == 0, "the places are free again")
    assert_unharmed(client)
