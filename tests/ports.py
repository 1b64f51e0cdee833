"""Ports for servers that a test starts, each handed out once.

A port that is only looked up may be taken before the server listens: by another test's server, or as the near end of
anybody's connection. So these lie below those that a system gives out by itself (from 32768 on Linux) and between those
of Ray's workers (10002 to 19999) and of Ray Serve's replicas (from 30000), and a lock says whose they are for as long
as the process lives.
"""

import fcntl
import itertools
import os
import socket
import tempfile
from pathlib import Path

LOCKS = Path(tempfile.gettempdir()) / f"gpt-foundry-ports-{os.getuid()}"
_candidates = iter(range(20_000, 30_000))
_held: list[int] = []


def free_port() -> int:
    """A free port that no other test gets, in this process or another."""
    LOCKS.mkdir(exist_ok=True)
    for port in _candidates:
        lock = os.open(LOCKS / str(port), os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:  # somebody else's
            os.close(lock)
            continue
        _held.append(lock)  # open, and so locked, until this process ends
        return port
    raise AssertionError("no port from 20000 to 29999 is free")


def free_ports(count: int) -> list[int]:
    """Several free ports."""
    return [free_port() for _ in itertools.repeat(None, count)]
