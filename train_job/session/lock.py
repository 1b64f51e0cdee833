"""A run is one run: whoever begins or resumes it has its folder to itself until it ends.

In: a run's folder, and the URL of its checkpoints where they are kept behind one. Out: the lock, or one line that says
who has it. A folder is locked by the system (`flock` on its file `.lock`), so the lock goes with the process, however
that ends; it holds between machines that share the folder as far as their file system passes locks on. A URL knows no
such lock. There the owner keeps a claim beside the checkpoints and renews it; one that was not renewed for
STALE_SECONDS is nobody's any more.
"""

import contextlib
import errno
import fcntl
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from gptcore.errors import ConfigError

LOCK = ".lock"
RENEW_SECONDS = 15.0
STALE_SECONDS = 120.0
ATTEMPTS = 5
"""How often one tries again who meets another in the same moment: both step back, and wait for a random while."""
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

Owner = dict[str, Any]
"""Who has a folder: `claim` (an id of its own), `host`, `pid` and `since`."""


class Taken(ConfigError):
    """A run's folder that is somebody else's now, or a name that a run has."""


def this_process() -> Owner:
    """Who we are, as others read it."""
    since = datetime.now().isoformat(sep=" ", timespec="seconds")
    return {"claim": uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "since": since}


@contextlib.contextmanager
def held(folder: Path) -> Iterator[tuple[Owner, Owner]]:
    """Within it the folder, which is made if need be, is this process's: yields us, and who had it before, if known.

    A run inside a sweep's folder shares the sweep's lock, so neither goes on while the other does. If nothing was put
    into the folder, it is gone afterwards. Raises Taken, at once, if another process has it.
    """
    us = this_process()
    with contextlib.ExitStack() as stack:
        if (folder.parent / LOCK).exists():
            stack.enter_context(_locked(folder.parent / LOCK, fcntl.LOCK_SH))
        file = stack.enter_context(_locked(folder / LOCK, fcntl.LOCK_EX))
        if file is None:  # a file system without locks
            with claimed(folder.parent.as_uri(), folder.name, us, {}):
                yield us, {}
            return
        before = _owner(file)
        file.truncate(0)
        file.write(json.dumps(us).encode())
        file.flush()
        try:
            yield us, before
        finally:
            with contextlib.suppress(OSError):
                if os.listdir(folder) == [LOCK]:
                    (folder / LOCK).unlink()
                    folder.rmdir()


@contextlib.contextmanager
def _locked(path: Path, kind: int) -> Iterator[IO[bytes] | None]:
    """The open file, locked; None where the file system has no locks."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:  # it is below a file, or in /proc
            if isinstance(error, FileExistsError) and (path.parent.is_dir() or not os.path.lexists(path.parent)):
                continue  # it was removed in between
            raise ConfigError(f"{path.parent} cannot be a run's folder: {error.strerror}") from None
        try:
            file = open(path, "a+b")  # noqa: SIM115
        except FileNotFoundError:  # its folder was removed in between
            continue
        except IsADirectoryError:
            raise ConfigError(f"{path} is a folder, expected a file; remove it if no run is going on there") from None
        with file:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise taken(path.parent.name, _owner(file)) from None
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                yield None
                return
            if _is_there(file, path):
                yield file
                return


def _is_there(file: IO[bytes], path: Path) -> bool:
    """Whether the file is still what its path names: its folder may have been removed after it was opened."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def taken(name: str, owner: Owner) -> Taken:
    """The refusal, with what is known of the owner."""
    who = "another process"
    if owner:
        who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
    return Taken(f"{name!r} is being run by {who}; wait for its end or stop it, or choose another --name")


def _owner(file: IO[bytes]) -> Owner:
    file.seek(0)
    return _parsed(file.read())


def _parsed(text: bytes) -> Owner:
    """A record that may be cut or empty: then nothing is known."""
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    return {}


@contextlib.contextmanager
def claimed(url: str, name: str, us: Owner, before: Owner) -> Iterator[None]:
    """Within it the run `name` below a storage URL is this process's, as far as a store without locks can say.

    `before` is who had the lock of the run's folder here, which is ours now: its claim means nothing any more. Raises
    Taken if there is a claim that was renewed within STALE_SECONDS.
    """
    claim = Claim(url, name, us)
    claim.take(before)
    try:
        yield
    finally:
        claim.release()


def _beginning(name: str) -> str:
    """What the names of all claims to a run begin with."""
    return f".{name}.claim-"


class Claim:
    """A file beside a run's folder behind a URL, `.NAME.claim-ID.json`, that says who runs it; renewed in a thread.

    Everyone writes a file of his own first and looks for others' then. A store that shows what was written (S3 and
    Google's do) shows at least the later of two the other's, so two never both pass. Nothing is written to the run's
    folder: it could not be taken away again without a moment in which another's claim goes with it.
    """

    def __init__(self, url: str, name: str, us: Owner) -> None:
        from pyarrow.fs import FileSystem

        self.fs, self.above = FileSystem.from_uri(url)
        self.name, self.us = name, us
        self.path = self._path(us)
        self._over = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True)

    def take(self, before: Owner) -> None:
        """Raises Taken if it is another's."""
        if before.get("claim"):
            self._remove(self._path(before))
        for attempt in range(ATTEMPTS):
            self._write(held=False)
            if not (others := self._others()):
                self._write(held=True)
                self._renewing.start()
                return
            self._remove(self.path)
            if any(other.get("held") for other in others) or attempt == ATTEMPTS - 1:
                raise taken(self.name, others[0])
            time.sleep(random.uniform(0.1, 0.8))

    def release(self) -> None:
        """Takes the claim away."""
        self._over.set()
        self._renewing.join()
        with contextlib.suppress(OSError):  # then it is stale before long
            self._remove(self.path)

    def _path(self, owner: Owner) -> str:
        return f"{self.above}/{_beginning(self.name)}{owner['claim']}.json"

    def _write(self, held: bool) -> None:
        with self.fs.open_output_stream(self.path) as file:
            file.write(json.dumps(self.us | {"held": held, "renewed": time.time()}).encode())

    def _read(self, path: str) -> Owner | None:
        """What the file says; None if it is not there."""
        try:
            with self.fs.open_input_stream(path) as file:
                return _parsed(file.read())
        except FileNotFoundError:
            return None

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(path)

    def _others(self) -> list[Owner]:
        """The claims of others that count, one of a sweep that the run is of among them; the rest is removed."""
        from pyarrow.fs import FileSelector

        above, _, sweep = self.above.rpartition("/")
        infos = self.fs.get_file_info(FileSelector(self.above, allow_not_found=True))
        claims = {info.path: info for info in infos if info.base_name.startswith(_beginning(self.name))}
        if above:
            infos = self.fs.get_file_info(FileSelector(above, allow_not_found=True))
            claims |= {info.path: info for info in infos if info.base_name.startswith(_beginning(sweep))}
        ours = claims.pop(self.path, None)
        found = []
        for path, info in claims.items():
            if (owner := self._read(path)) is None:
                continue
            age = time.time() - float(owner.get("renewed", 0))
            if ours and ours.mtime and info.mtime:  # the store's own clock, where it has one
                age = (ours.mtime - info.mtime).total_seconds()
            if age > STALE_SECONDS:
                self._remove(path)
            else:
                found.append(owner)
        return found

    def _renew(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            try:
                if self._read(self.path) is None:
                    print(f"{self.name} was taken over, as its storage was out of reach: stopping", file=sys.stderr)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._write(held=True)
            except OSError:  # storage that is away; whether it was taken over meanwhile is seen when it is back
                continue
