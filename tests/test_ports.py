"""Each test gets its own ports."""

import socket
import subprocess
import sys

from tests.ports import free_port
from tests.system.conftest import ROOT

TAKE = "from tests.ports import free_port; print(*(free_port() for _ in range(5))); input()"


def test_no_two_processes_get_the_same_port_or_a_used_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port() + 1))
        pipe = subprocess.PIPE
        others = [
            subprocess.Popen([sys.executable, "-c", TAKE], cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
            for _ in range(2)
        ]
        given = [int(port) for other in others for port in (other.stdout or ()).readline().split()]
        given += [free_port() for _ in range(5)]
        for other in others:
            other.communicate("\n")
        assert len(set(given)) == 15
        assert taken.getsockname()[1] not in given


def test_ports_are_outside_the_range_of_outgoing_connections() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getsockname()[1] >= 32_000
