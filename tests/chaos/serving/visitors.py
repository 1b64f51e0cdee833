"""Clients that behave badly."""

import contextlib
import random
import socket
import time
from contextlib import ExitStack

from tests.chaos.clients import Ask
from tests.chaos.fault import Result
from tests.chaos.serving.scene import SLOTS, Scene, tally

LONG = Ask("Once", 1, 100, stream=True)


def bad_clients(scene: Scene, rng: random.Random) -> Result:
    """Clients that leave, that never read, that send a byte a second, and a thousand connections that say nothing."""
    scene.await_whole()
    port, result, begun = scene.port, Result(), time.monotonic()
    head = f"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(LONG.body)}\r\n\r\n".encode()
    with ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=30)))

        for _ in range(100):  # they leave
            with contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=30)) as leaving:
                leaving.sendall(head + LONG.body)
                leaving.recv(rng.choice((1, 100)))
            result.times += 1
        for _ in range(SLOTS):  # they never read
            unread = connect()
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            unread.sendall(head + LONG.body)
            result.times += 1
        slow = [connect() for _ in range(50)]
        idle = [connect() for _ in range(1000)]
        result.times += len(slow) + len(idle)
        for byte in head[:8]:
            for connection in slow:
                with contextlib.suppress(OSError):  # the front waits ten seconds for a request
                    connection.sendall(bytes([byte]))
            time.sleep(1)
        result.recovery.append(scene.clients.await_calm(time.monotonic(), 60))
    return tally(scene, begun, result, ("unavailable",))
