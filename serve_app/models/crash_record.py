"""A record on disk of loads that crashed their replica, and of the version served last, for the replicas that follow.

A process may be killed during a load (out of memory, a crash in native code) and cannot report it. So each load holds
a locked file and deletes it when it ends; a file that is left unlocked stands for a crash.
"""

import fcntl
import hashlib
import logging
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from gptcore.files import write_file
from gptcore.home import home

log = logging.getLogger(__name__)

FIRST_WAIT_S, ALONE_WAIT_S, LONGEST_WAIT_S, GROWTH = 600.0, 10.0, 86400.0, 6
"""Waits after a crash: ten minutes, an hour, six hours, a day. If no other version can be served: ten seconds, a minute
and so on. Each attempt may crash a replica together with its running requests."""


@dataclass(frozen=True)
class Crashes:
    """How many replicas crashed while loading a version, and when the last of these loads began (Unix time)."""

    count: int
    last: float
    folder: Path
    """The folder with the record; deleting it clears the record."""

    def retry_at(self, alone: bool) -> float:
        """When (Unix time) to try the version again; `alone`: no other version can be served."""
        wait = (ALONE_WAIT_S if alone else FIRST_WAIT_S) * float(GROWTH) ** min(self.count - 1, 20)
        return self.last + min(wait, LONGEST_WAIT_S)

    @property
    def reason(self) -> str:
        """One line for people."""
        last = datetime.fromtimestamp(self.last, UTC).isoformat(timespec="seconds")
        replicas = "a replica" if self.count == 1 else f"{self.count} replicas, the last one"
        return (
            f"{replicas} died in a load of it that began at {last}; see the log for the reason, often a lack of "
            f"memory. It is tried again later, or at once if you delete the folder {self.folder.parent.name} in "
            "GPT_FOUNDRY_HOME"
        )


class CrashRecord:
    """The record of one source's loads on this machine. If the disk cannot be written, loads work unrecorded."""

    def __init__(self, source: str, tracking_uri: str, folder: Path | None = None) -> None:
        named = hashlib.sha256(f"{tracking_uri}\n{source}".encode()).hexdigest()[:16]
        self._folder = (folder or home() / ".cache" / "loading") / named

    @contextmanager
    def loading(self, version: str) -> Iterator[None]:
        """Mark `version` as being loaded within the block, so that the next process learns of a crash."""
        file, held = self._attempts(version) / uuid.uuid4().hex, None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            held = file.open("xb")
            fcntl.flock(held, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("loads are not recorded in %s: %s", self._folder, error.strerror)
        try:
            yield
        finally:
            with suppress(OSError):
                file.unlink()
            if held is not None:
                held.close()

    def crashes(self, version: str) -> Crashes | None:
        """The loads of `version` that crashed; None if there are none."""
        folder, dead = self._attempts(version), []
        for file in folder.glob("*"):
            # An error means that the load is running, here or in another replica, or has just ended.
            with suppress(OSError), file.open("rb") as left:
                fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                dead.append(file.stat().st_mtime)
        return Crashes(len(dead), min(max(dead), time.time()), folder) if dead else None

    def last_served(self) -> str | None:
        """The version that was served last, if known."""
        try:
            return (self._folder / "served").read_text(encoding="utf-8")[:64] or None
        except (OSError, ValueError):
            return None

    def record_served(self, version: str) -> None:
        """Record that `version` is served, and forget its earlier crashes."""
        shutil.rmtree(self._attempts(version), ignore_errors=True)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_file(self._folder / "served", version.encode())
        except OSError as error:
            log.warning("what is served is not recorded in %s: %s", self._folder, error.strerror)

    def _attempts(self, version: str) -> Path:
        return self._folder / f"version-{quote(version, safe='')}"
