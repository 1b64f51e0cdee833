"""Watches what the interpreter does while untrusted bytes are read: no file outside a folder, no pickle, no program."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = (
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "exec",
)
READABLE = (
    *(os.path.realpath(place) for place in (sys.prefix, sys.base_prefix, ROOT)),
    "/proc/meminfo",
    "/proc/self",
    "/sys/fs/cgroup",
    "/dev/null",
    "/dev/urandom",
)
"""Python's own files and ours, which are imported when they are first needed, and how much memory there is."""
_folder, _thread = "", 0


class Violation(BaseException):
    """Something that no input may bring about. Not an Exception, so that nothing catches it by accident."""


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Within the block, raises Violation for a file outside `folder` and for what is FORBIDDEN."""
    global _folder, _thread
    _folder, _thread = os.path.realpath(folder), threading.get_ident()
    try:
        yield
    finally:
        _folder = ""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _folder or threading.get_ident() != _thread:
        return
    if event in FORBIDDEN and not (event == "exec" and _is_import(arguments[0])):
        raise Violation(f"{event} {arguments!r}")
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not path.startswith((_folder, *READABLE)):
            raise Violation(f"open {path}")


def _is_import(code: Any) -> bool:
    """Whether code is a module's, or was made by a library that is installed: dataclasses and Jinja compile some."""
    return str(getattr(code, "co_filename", "")).startswith((*READABLE, "<frozen", "<string>", "<template>", "<attrs"))


sys.addaudithook(_hook)
