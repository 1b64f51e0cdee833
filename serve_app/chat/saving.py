"""Writes a chat to a file, whole or not at all: a text to a new file, a conversation as one more line of JSON."""

import json
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from gptcore.errors import ConfigError
from gptcore.files import write_file
from serve_app.chat.terminal import CONTROLS


def save(path: Path, text: str) -> None:
    """Write a new file. Raises ConfigError."""
    with _writing(path):
        if path.exists():
            raise ConfigError(f"{path} exists; expected the name of a new file")
        write_file(path, text.encode(errors="replace"))


def append(path: Path, messages: Sequence[Mapping[str, str]]) -> None:
    """Add the line `{"messages": […]}` to a file of such lines, or write a new file. Raises ConfigError."""
    line = json.dumps({"messages": messages}, ensure_ascii=False)
    line = CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", line)  # JSON itself leaves some of them unescaped
    with _writing(path):
        before, mode = b"", 0o666
        if path.exists():
            path = path.resolve()  # a link stays one
            before, mode = path.read_bytes() if path.is_file() else b"?", stat.S_IMODE(path.stat().st_mode)
        *_, last = before.splitlines() or [b""]
        if before and not _is_conversation(last):
            raise ConfigError(f"{path} does not end with a conversation; expected a new file, or one saved before")
        end = b"\n" if before and not before.endswith(b"\n") else b""
        write_file(path, before + end + line.encode(errors="replace") + b"\n", mode)


def _is_conversation(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line)["messages"], list)
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: an invalid file name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{str(path)!r} cannot be written: {str(reason).lower()}") from None
