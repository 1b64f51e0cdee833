"""Waits by polling: for other processes, threads and servers, whose changes no event announces."""

import asyncio
import contextlib
import http.client
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEADLINE_SECONDS = 30.0
SHORTEST_PAUSE, LONGEST_PAUSE = 0.005, 0.1  # seconds


def eventually(claim: Callable[[], Any], what: str, seconds: float = DEADLINE_SECONDS) -> Any:
    """Waits until `claim()` is true, and returns its value. Fails after `seconds` with a message that names `what`."""
    end, pause = time.monotonic() + seconds, SHORTEST_PAUSE
    while not (value := claim()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    return value


async def until(claim: Callable[[], Any]) -> None:
    """Waits in a coroutine until `claim()` is true. The test's own time limit is the deadline."""
    while not claim():
        await asyncio.sleep(0.001)


def await_server(
    server: subprocess.Popen[bytes], answers: Callable[[], bool], log: Path, seconds: float = DEADLINE_SECONDS
) -> None:
    """Waits until `answers()` is true. Fails with the server's log if the server ends first or takes too long."""
    try:
        eventually(lambda: answers() or server.poll() is not None, "the server answers", seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text()}") from None
    assert server.poll() is None, f"the server ended:\n{log.read_text()}"


def is_up(url: str) -> bool:
    """Whether a GET of `url` succeeds."""
    with contextlib.suppress(OSError, http.client.HTTPException), urllib.request.urlopen(url, timeout=5):
        return True
    return False
