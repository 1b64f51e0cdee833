"""What replicas tell those that come after them: which version was served, and which one a replica died of loading.

In: loads as they begin and end. Out: how often a version's load ended with its process (killed for memory, a crash in
native code), and the last version that was served. It is kept in files, since a process that is killed says nothing:
a load holds a locked file that it deletes when it ends, so a file that nobody holds is a death.
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
"""After a death a version waits ten minutes, an hour, six, a day; where nothing else can be served, ten seconds, a
minute, and so on: each further attempt may cost a replica, with all that it is answering."""


@dataclass(frozen=True)
class Crashes:
    """How many replicas died while they loaded a version, and when the last of these loads began (Unix time)."""

    count: int
    last: float
    noted: Path
    """The folder that says so; without it, nothing is known."""

    def retry_at(self, alone: bool) -> float:
        """When (Unix time) the version may be tried again; `alone`: there is no other to serve."""
        wait = (ALONE_WAIT_S if alone else FIRST_WAIT_S) * float(GROWTH) ** min(self.count - 1, 20)
        return self.last + min(wait, LONGEST_WAIT_S)

    @property
    def reason(self) -> str:
        """One line for people."""
        last = datetime.fromtimestamp(self.last, UTC).isoformat(timespec="seconds")
        replicas = "a replica" if self.count == 1 else f"{self.count} replicas, the last one"
        return (
            f"{replicas} died in a load of it that began at {last}; the log may say of what, often of lack of memory. "
            f"It is tried again later, or at once if the folder {self.noted.parent.name} below GPT_FOUNDRY_HOME is "
            "deleted"
        )


class CrashRecord:
    """The record of one source's loads on this machine. A disk that cannot be written costs the memory, no load."""

    def __init__(self, source: str, tracking_uri: str, folder: Path | None = None) -> None:
        named = hashlib.sha256(f"{tracking_uri}\n{source}".encode()).hexdigest()[:16]
        self._folder = (folder or home() / ".cache" / "loading") / named

    @contextmanager
    def loading(self, version: str) -> Iterator[None]:
        """Within it, `version` is being loaded: if the process dies, that is known to the next."""
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
        """The loads of `version` that no process has ended; None if there are none."""
        folder, dead = self._attempts(version), []
        for file in folder.glob("*"):
            # An error: it is at work, here or in another replica, or has ended just now.
            with suppress(OSError), file.open("rb") as left:
                fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                dead.append(file.stat().st_mtime)
        return Crashes(len(dead), min(max(dead), time.time()), folder) if dead else None

    def last_served(self) -> str | None:
        """The version that was served last, if that is known."""
        try:
            return (self._folder / "served").read_text(encoding="utf-8")[:64] or None
        except (OSError, ValueError):
            return None

    def record_served(self, version: str) -> None:
        """Records that `version` was loaded and is served; what died of it before is forgotten."""
        shutil.rmtree(self._attempts(version), ignore_errors=True)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_file(self._folder / "served", version.encode())
        except OSError as error:
            log.warning("what is served is not recorded in %s: %s", self._folder, error.strerror)

    def _attempts(self, version: str) -> Path:
        return self._folder / f"version-{quote(version, safe='')}"
