"""Runs the chat for tests, in a pseudo-terminal or a pipe, and the service that it talks to."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pexpect

from serve_app.chat.client import KEY_VARIABLE
from serve_app.chat.terminal import harmless
from serve_app.settings import ServeSettings
from tests.serve_app.conftest import MakePackage
from tests.serve_app.running import Running, running

CHAT = [sys.executable, "-m", "serve_app.chat"]
LONG, SHORT_CONTEXT = 4000, 128
FIGURES = r"\S+ version \S+ · \d+ tokens?(?: · \d+ tokens/s)? · seed -?\d+ · ([a-z ]+)\r\n"
PROMPT = r"(?:\A|\n)(?:\x1b\[\?2004h)?> \Z"
Open = Callable[..., "Terminal"]


@contextmanager
def speaking(make_package: MakePackage) -> Iterator[Running]:
    """A service with a slow model and one with a short context. One request runs and one waits."""
    shape = dict(hidden_size=256, num_layers=4, num_heads=4, context_length=LONG + 100)
    paths = (f"tiny={make_package(0, **shape).path}", f"short={make_package(1).path}")
    with running(
        ServeSettings(models=paths, slots=1, max_queue=1, max_new_tokens=LONG, log_level="warning")
    ) as service:
        yield service


class Terminal:
    """A chat in a pseudo-terminal. `seen` has the output since the last look."""

    def __init__(self, url: str, *flags: str, home: Path, command: Sequence[str] = CHAT, **environment: str) -> None:
        # A dumb terminal gets nothing but text from readline: all control characters are somebody else's.
        plain = {"TERM": "dumb", "XDG_STATE_HOME": str(home), "PYTHONUTF8": "1", KEY_VARIABLE: ""}
        self.process = pexpect.spawn(
            command[0],
            [*command[1:], "--url", url, *flags],
            env=os.environ | plain | environment,  # type: ignore[arg-type]
            encoding="utf-8",
            codec_errors="replace",  # a line that is scrolled sideways may be shown from within a character
            dimensions=(24, 250),
            timeout=30,
        )
        self.seen = ""

    def type(self, line: str) -> None:
        """Types a line, and removes its echo from the output."""
        self.process.sendline(line)
        self.see(re.escape(line) + "\r\n")

    def see(self, pattern: str) -> str:
        """Waits for the pattern. Returns the output up to and including it."""
        self.process.expect(pattern)
        self.seen = self.process.before + self.process.after
        return self.seen

    def prompt(self) -> str:
        """Waits for the next prompt. Returns the output before it."""
        return self.see(PROMPT).removesuffix("> ")

    def do(self, line: str) -> str:
        """Types a line and waits for the next prompt. Returns the output in between."""
        self.type(line)
        return self.prompt()

    def ask(self, line: str) -> str:
        """Types a prompt; returns the answer, with its figures."""
        self.type(line)
        answer = self.see(FIGURES)
        self.prompt()
        return answer


def piped(url: str, *flags: str, given: str | bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The chat with its input from a pipe."""
    given = given.encode() if isinstance(given, str) else given
    known = os.environ | {KEY_VARIABLE: "", "PYTHONUTF8": "1"} | environment
    return subprocess.run([*CHAT, "--url", url, *flags], input=given, capture_output=True, timeout=60, env=known)


def api(service: Running, prompt: str, **fields: Any) -> str:
    """The text from the service's API."""
    body = {"prompt": prompt, "ignore_eos": True, **fields}
    reply = httpx2.post(f"{service.url}/generate", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def on_screen(text: str) -> str:
    """A text as a terminal gets it."""
    return harmless(text).replace("\n", "\r\n")
