"""HAProxy, started by Ray's own manager through the supervisor, without a cluster."""

import asyncio
import http.client
import json
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import ray.serve._private.haproxy as rays

from serve_app.front import haproxy
from serve_app.front.haproxy import SUPERVISOR
from tests.waiting import eventually

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform != "linux", reason="Ray brings HAProxy on Linux alone"),
]

ANSWERS = {"/good": (200, "application/json"), "/plain": (500, "text/plain"), "/lost": (404, "text/plain; charset=x")}


class Replica(BaseHTTPRequestHandler):
    """A replica that answers Ray's health check, and errors that our app would not send."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        status, kind = ANSWERS.get(self.path, (200 if self.path == "/-/healthz" else 404, "application/json"))
        body = b'{"mine": true}'
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass


class ClosingReplica(Replica):
    """A replica that closes each connection on which it gets a request."""

    asked: ClassVar[list[int]] = []
    """The ports of those that got one."""

    def do_POST(self) -> None:
        self.asked.append(self.server.server_address[1])
        self.close_connection = True


@pytest.fixture
def replica() -> Iterator[int]:
    """The port of a replica."""
    with running(Replica) as port:
        yield port


@contextmanager
def running(kind: type[Replica]) -> Iterator[int]:
    """Runs a replica, and yields its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


class Manager:
    """Runs Ray's own code that starts, reloads and stops HAProxy."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port = port
        config = rays.HAProxyConfig(
            http_options=rays.HTTPOptions(host="127.0.0.1", port=port),
            socket_path=str(folder / "admin.sock"),
            server_state_base=str(folder),
            server_state_file=str(folder / "server-state"),
            metrics_socket_path=str(folder / "metrics.sock"),
            health_check_inter="1s",
            health_check_rise=1,
        )
        self.api = rays.HAProxyApi(config, config_file_path=str(folder / "front.cfg"))

    def serve(self, *ports: int) -> None:
        servers = [rays.ServerConfig(name=f"replica-{port}", host="127.0.0.1", port=port) for port in ports]
        backend = rays.BackendConfig(name="http-default", path_prefix="/", servers=servers, app_name="default")
        self.api.set_backend_configs({"http-default": backend})

    @property
    def supervisor(self) -> psutil.Process:
        return psutil.Process(self.api._proc.pid)

    def haproxy(self) -> psutil.Process:
        """The HAProxy of the newest supervisor, once it has started."""
        eventually(lambda: any(child.name() == "haproxy" for child in self.supervisor.children()), "HAProxy is there")
        return next(child for child in self.supervisor.children() if child.name() == "haproxy")

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, dict[str, str], Any]:
        """(status, headers, JSON of the body)."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            connection.request("GET" if body is None else "POST", path, body)
            reply = connection.getresponse()
            return reply.status, {name.lower(): value for name, value in reply.getheaders()}, json.load(reply)

    async def reply(self, sent: bytes) -> tuple[bytes, bytes, bytes]:
        """(head, separator, body) of everything received until the connection closes."""
        received = b""
        with closing(socket.create_connection(("127.0.0.1", self.port), timeout=20)) as connection:
            connection.sendall(sent)
            while part := await asyncio.to_thread(connection.recv, 65536):
                received += part
        return received.partition(b"\r\n\r\n")

    async def answer(self, path: str = "/good") -> int:
        """The status, once a server listens."""

        def answered() -> int | None:
            with suppress(OSError, http.client.HTTPException):
                return self.ask(path)[0]
            return None

        return int(await asyncio.to_thread(eventually, answered, "a server listens"))


@asynccontextmanager
async def managed(folder: Path, *ports: int, port: int = 0, stop: bool = True) -> AsyncIterator[Manager]:
    manager = Manager(folder, port or haproxy.free_port())
    manager.serve(*ports)
    await manager.api.start()
    try:
        yield manager
    finally:
        if stop:
            await manager.api.stop()


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of Ray's manager, which starts the supervisor as its HAProxy."""
    supervisor = Path(sysconfig.get_path("scripts")) / SUPERVISOR
    monkeypatch.setattr(rays, "RAY_SERVE_HAPROXY_BINARY_PATH", str(supervisor))
    monkeypatch.setenv(haproxy.BODY_TIMEOUT, "1")
    return tmp_path_factory.mktemp("f")  # sockets want a short path


def gone(process: psutil.Process) -> bool:
    """Whether it and its threads have ended, also where nobody has asked for its exit code.

    A process whose first thread has ended is a zombie while its other threads still hold its sockets.
    """
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE and process.num_threads() == 1
    return True


def assert_unavailable(reply: tuple[int, dict[str, str], Any]) -> None:
    status, headers, body = reply
    assert status == 503
    assert int(headers["retry-after"]) >= 1
    assert headers["content-type"] == "application/json"
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["type"], body["error"]["code"]) == ("server_error", "unavailable")


async def test_without_a_replica_every_route_is_503_in_openais_form(folder: Path):
    async with managed(folder) as manager:
        for path in ("/ready", "/v1/models", "/nowhere"):
            assert_unavailable(manager.ask(path))
        manager.api.set_backend_configs({})  # as before the first application
        await manager.api.reload()
        assert_unavailable(manager.ask("/ready"))


async def test_plain_text_errors_from_ray_become_503_and_the_apps_own_errors_pass(folder: Path, replica: int):
    async with managed(folder, replica) as manager:
        assert await manager.answer() == 200
        assert_unavailable(manager.ask("/plain"))
        assert_unavailable(manager.ask("/lost"))
        status, _, body = manager.ask("/unknown")
        assert (status, body) == (404, {"mine": True})


async def test_a_missing_replica_is_503_in_openais_form(folder: Path):
    async with managed(folder, haproxy.free_port()) as manager:
        assert_unavailable(manager.ask("/good"))


async def test_a_killed_haproxy_restarts_at_once_and_ray_can_still_reload_it(folder: Path, replica: int):
    async with managed(folder, replica) as manager:
        assert await manager.answer() == 200
        killed = manager.haproxy()
        killed.kill()
        begun = time.monotonic()
        killed.wait()
        assert await manager.answer() == 200
        assert time.monotonic() - begun < 30  # left to Ray it takes 31
        assert await manager.api.is_running()
        assert manager.haproxy().pid != killed.pid
        old = manager.haproxy()
        manager.serve()
        await manager.api.reload()
        eventually(lambda: gone(old), "the HAProxy from before, which shares the port, has ended")
        assert_unavailable(manager.ask("/good"))


async def test_no_request_fails_during_a_reload(folder: Path, replica: int):
    async with managed(folder, replica) as manager:
        assert await manager.answer() == 200
        told: list[Any] = []
        stop = threading.Event()

        def client() -> None:
            while not stop.is_set():
                try:
                    told.append(manager.ask("/good")[0])
                except Exception as error:
                    told.append(repr(error))

        thread = threading.Thread(target=client)
        thread.start()
        before = manager.supervisor
        for _ in range(3):
            await manager.api.reload()
        stop.set()
        thread.join()
        assert set(told) == {200}
        eventually(lambda: gone(before), "the supervisor before has left")


async def test_a_request_that_a_stopping_replica_drops_is_sent_to_another(folder: Path, replica: int):
    """A replica that stops closes its listener, and connections that it has accepted but not read."""
    with running(ClosingReplica) as closing_port:
        async with managed(folder, closing_port, replica) as manager:
            assert await manager.answer() == 200
            assert [manager.ask("/good", b"{}")[0] for _ in range(6)] == [200] * 6


async def test_a_request_that_ends_its_replica_reaches_only_one_more(folder: Path):
    with running(ClosingReplica) as one, running(ClosingReplica) as two, running(ClosingReplica) as three:
        async with managed(folder, one, two, three) as manager:
            assert await manager.answer() == 200
            ClosingReplica.asked.clear()
            assert manager.ask("/good", b"{}")[0] == 503
            assert len(ClosingReplica.asked) == 2


async def test_after_ray_stops_haproxy_the_port_is_free(folder: Path, replica: int):
    async with managed(folder, replica) as manager:
        assert await manager.answer() == 200
        child = manager.haproxy()
        await manager.api.stop()
        eventually(lambda: gone(child), "HAProxy has ended with its supervisor")
        socket.create_server(("127.0.0.1", manager.port)).close()


MANAGER = """
import asyncio, sys, time
from pathlib import Path
import ray.serve._private.haproxy as rays
rays.RAY_SERVE_HAPROXY_BINARY_PATH = {supervisor!r}
sys.path.insert(0, {root!r})
from tests.serve_app.front.test_supervisor import Manager
async def main():
    manager = Manager(Path({folder!r}), {port})
    manager.serve({replica})
    await manager.api.start()
    print("started", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


NODE = "import subprocess, sys, time; subprocess.call(sys.argv[1:]); time.sleep(600)"


async def test_haproxy_outlives_a_killed_manager_and_ends_with_the_node(folder: Path, replica: int):
    """The node is a process whose child is the manager, as Ray's is."""
    port, root = haproxy.free_port(), str(Path(__file__).parents[3])
    supervisor = rays.RAY_SERVE_HAPROXY_BINARY_PATH
    code = MANAGER.format(supervisor=supervisor, root=root, folder=str(folder), port=port, replica=replica)
    node = subprocess.Popen(
        [sys.executable, "-c", NODE, sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert node.stdout
    assert node.stdout.readline() == "started\n"
    (killed,) = psutil.Process(node.pid).children()
    orphan = next(child for child in killed.children() if SUPERVISOR[:15] in child.name())
    killed.kill()
    outside = Manager(folder, port)
    assert await outside.answer() == 200
    async with managed(folder, replica, port=port) as manager:
        assert await manager.answer() == 200
        eventually(lambda: gone(orphan), "the supervisor without a manager has left")
    node.kill()
    node.wait()


async def test_a_body_that_does_not_arrive_is_408_and_reaches_no_replica(folder: Path, replica: int):
    async with managed(folder, replica) as manager:
        assert await manager.answer() == 200
        head, _, body = await manager.reply(b"POST /good HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body)["error"]["code"] == "timeout"
        head, _, _ = await manager.reply(b"POST /good HTTP/1.1\r\nhost: loc")  # HAProxy says that itself
        assert head.startswith(b"HTTP/1.1 408 ")


async def test_statistics_listen_only_if_a_port_is_set_for_them():
    text = "frontend prometheus\n    bind :9101\n    no log\nfrontend http_frontend\n    bind *:1\n"
    text += "listen stats\n  bind *:2\n"
    assert "9101" not in haproxy.amend_config(text, Path("s"), Path("u"), {})
    assert "*:2" not in haproxy.amend_config(text, Path("s"), Path("u"), {})
    kept = haproxy.amend_config(text, Path("s"), Path("u"), {"RAY_SERVE_HAPROXY_STATS_PORT": "2"})
    assert "*:2" in kept
    assert "9101" not in kept
