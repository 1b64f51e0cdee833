"""Servers that replace the service at an address: a relay that drops connections, and one with scripted replies."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.ports import free_port

RESET = struct.pack("ii", 1, 0)
"""For SO_LINGER: a close that resets the connection, as a process that was killed leaves it."""


class Relay:
    """Forwards connections from one port to `target` until it is cut. It can be opened again on the same port."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self._port = free_port()  # nobody else gets it while the relay is cut
        self.listen()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def listen(self) -> None:
        """Accepts connections, on the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Resets every connection, and refuses new ones."""
        assert self._listener
        # A thread that waits in accept keeps the port open even after close; a shutdown wakes it.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()

    def drop(self) -> None:
        """Resets every connection."""
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                host, port = self.target.removeprefix("http://").split(":")
                far = socket.create_connection((host, int(port)))
                self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=_pump, args=(one, other), daemon=True).start()


def _pump(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_WR)


@contextmanager
def saying(*replies: bytes) -> Iterator[str]:
    """The address of a server that answers the n-th connection with the n-th reply, the last for all that follow."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            left = list(replies)
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(65536)
                        connection.sendall(left.pop(0) if len(left) > 1 else left[0])
                        connection.shutdown(socket.SHUT_WR)
                        while connection.recv(65536):
                            pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
