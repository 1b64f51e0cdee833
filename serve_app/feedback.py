"""Votes on answers, kept as JSON lines that train as they are: `train_job/run.py --objective chat --data PLACE`.

Each replica writes files of its own, so several can share a place without locks. A file is begun at a replica's first
vote, and when the last one is full. Object stores cannot append, so every vote writes the current file as a whole, and
no reader ever sees a part of one.
"""

import contextlib
import json
import re
import threading
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gptcore.errors import ConfigError, HubError
from gptcore.files import write_file
from gptcore.redact import reason, without_password
from gptcore.stores import file_system

FILE_BYTES = 2**20
"""A file that would be larger is not extended, except by its first vote."""
NAME = re.compile(r"\d{8}T\d{12}-[0-9a-f]{8}\.jsonl")
"""Of the files, which sort by the time when they were begun. Others in the same place are left alone."""


def open_log(place: str, most_bytes: int) -> "FeedbackLog | None":
    """The log at a place, or None for no place. Raises ConfigError."""
    return FeedbackLog(place, most_bytes) if place else None


class FeedbackLog:
    """Files of votes in a folder or at a URL. Safe to use from several threads.

    The oldest files are deleted when a new one is begun and all of them could exceed `most_bytes`.
    Raises ConfigError if the place cannot be opened.
    """

    def __init__(self, place: str, most_bytes: int) -> None:
        try:
            self._fs, self._folder = file_system(place)
            self._fs.makedirs(self._folder, exist_ok=True)
        except (HubError, OSError) as error:
            shown = without_password(place)
            raise ConfigError(f"feedback is {shown!r}, which cannot be written: {reason(error)}", "feedback") from error
        self._most = most_bytes
        self._lock = threading.Lock()
        self._file = ""
        self._votes: list[Mapping[str, Any]] = []
        """Those in the current file."""

    def add(self, vote: Mapping[str, Any]) -> None:
        """Keep a vote. It replaces one in the current file on the same `answer` with the same `id`. Raises OSError."""
        with self._lock:
            votes = [old for old in self._votes if any(old[key] != vote[key] for key in ("id", "answer"))] + [vote]
            content, file = _lines(votes), self._file
            if not file or (len(content) > FILE_BYTES and len(votes) > 1):
                votes, content = [vote], _lines([vote])
                file = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}.jsonl"
                self._delete_oldest()
            self._write(f"{self._folder}/{file}", content)
            self._file, self._votes = file, votes

    def _write(self, path: str, content: bytes) -> None:
        if "file" in _protocols(self._fs):
            write_file(Path(path), content)  # fsspec's local files can be seen half-written
        else:
            self._fs.pipe_file(path, content)

    def _delete_oldest(self) -> None:
        """Make room for another file."""
        self._fs.invalidate_cache()  # other replicas write here too
        found = {entry["name"]: entry["size"] for entry in self._fs.ls(self._folder, detail=True)}
        ours = sorted(path for path in found if NAME.fullmatch(path.rpartition("/")[2]))
        excess = sum(found[path] for path in ours) + FILE_BYTES - self._most
        for path in ours:
            if excess <= 0:
                return
            excess -= found[path]
            with contextlib.suppress(FileNotFoundError):  # another replica was faster
                self._fs.rm_file(path)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _lines(votes: list[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(vote, ensure_ascii=False).encode() + b"\n" for vote in votes)
