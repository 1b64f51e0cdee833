"""Votes on answers, kept as JSON lines that train as they are: `train_job/run.py --objective chat --data PLACE`.

Each replica writes files of its own, so several can share a place without locks. A file is begun at a replica's first
vote, and when the last one is full. Object stores cannot append, so every vote writes the current file as a whole, and
no reader ever sees a part of one.
"""

import asyncio
import contextlib
import json
import re
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gptcore.errors import ConfigError, HubError, QueueFull
from gptcore.files import write_file
from gptcore.redact import reason, without_password
from gptcore.stores import file_system

FILE_BYTES = 2**20
"""A file that would be larger is not extended, except by its first vote."""
NAME = re.compile(r"\d{8}T\d{12}-[0-9a-f]{8}\.jsonl")
"""Of the files, which sort by the time when they were begun. Others in the same place are left alone."""
MOST_WAITING = 100
"""Votes that may wait while the store is slow."""
OWNERS = 0o600
"""The mode of a file: conversations are for their owner alone."""


def open_log(place: str, most_bytes: int) -> "FeedbackLog | None":
    """The log at a place, or None for no place. Raises ConfigError."""
    return FeedbackLog(place, most_bytes) if place else None


class FeedbackLog:
    """Files of votes in a folder or at a URL. The oldest are deleted when all could exceed `most_bytes`.

    Raises ConfigError if the folder cannot be made, or if nothing can open such a URL.
    """

    def __init__(self, place: str, most_bytes: int) -> None:
        try:
            self._fs, self._folder = file_system(place)
            self._local = "file" in _protocols(self._fs)
            if self._local:
                self._fs.makedirs(self._folder, exist_ok=True)
        except (HubError, OSError) as error:
            shown = without_password(place)
            raise ConfigError(f"feedback is {shown!r}, which cannot be written: {reason(error)}", "feedback") from error
        self._most = most_bytes
        # One thread of its own: votes are written in order, and a slow store delays nothing but votes.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="feedback")
        self._waiting = 0
        self._path = ""
        self._votes: list[Mapping[str, Any]] = []
        """Those in the current file."""
        self._size = 0
        """Of the current file, as it was last written."""

    async def keep(self, vote: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Write a vote, and return the one that it replaces: in the current file, on the same answer.

        Raises QueueFull while too many wait, and whatever the store raises.
        """
        if self._waiting >= MOST_WAITING:
            raise QueueFull(f"{self._waiting} votes wait to be written, as many as may wait; try again later")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._writer, self.add, vote)
        finally:
            self._waiting -= 1

    def add(self, vote: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """`keep` in this thread; call it from one thread only."""
        self._fs.invalidate_cache()  # others change files here too
        unchanged = self._unchanged()
        path, votes = self._path, self._votes if unchanged else []
        replaced = next((old for old in votes if _subject(old) == _subject(vote)), None)
        votes = [old for old in votes if old is not replaced] + [vote]
        content = _lines(votes)
        if not unchanged or (len(content) > FILE_BYTES and not replaced and len(votes) > 1):
            votes, content = [vote], _lines([vote])
            path = f"{self._folder}/{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}.jsonl"
        if self._local:  # fsspec's local files can be seen half-written
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            write_file(Path(path), content, OWNERS)
        else:
            self._fs.pipe_file(path, content)
        begun = path != self._path
        self._path, self._votes, self._size = path, votes, len(content)
        if begun:
            self._delete_oldest()
        return replaced

    def _unchanged(self) -> bool:
        """Whether the current file is as it was written. One that was edited or removed is not written again."""
        try:
            return bool(self._path) and self._fs.info(self._path)["size"] == self._size
        except FileNotFoundError:
            return False

    def _delete_oldest(self) -> None:
        """Leave room for the current file to grow."""
        found = {entry["name"]: entry["size"] for entry in self._fs.ls(self._folder, detail=True)}
        ours = sorted(path for path in found if NAME.fullmatch(path.rpartition("/")[2]))
        excess = sum(found[path] for path in ours[:-1]) + max(FILE_BYTES, self._size) - self._most
        for path in ours[:-1]:
            if excess <= 0:
                return
            excess -= found[path]
            with contextlib.suppress(FileNotFoundError):  # another replica was faster
                self._fs.rm_file(path)


def _subject(vote: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a vote is about."""
    return vote["id"], vote["answer"], vote["messages"][:-1]


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _lines(votes: list[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(vote, ensure_ascii=False).encode() + b"\n" for vote in votes)
