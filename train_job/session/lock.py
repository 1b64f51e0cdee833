"""Locks a run's folder, so that only one process at a time starts or resumes the run.

In: a run's folder, and the URL of its checkpoints if they are kept behind one. Out: the lock, or one line that names
the owner. A folder is locked by the system (`flock` on its file `.lock`), so the lock goes with the process, however
that ends. Between machines that share the folder it holds as far as their file system supports locks. A URL has no such
lock: there the owner writes a claim beside the checkpoints and renews it. A claim that was not renewed for
STALE_SECONDS has expired.
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
"""How often two processes that claim a run at the same moment try again; both back off for a random time."""
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

Owner = dict[str, Any]
"""The owner of a folder: `claim` (a unique id), `host`, `pid` and `since`."""


class Taken(ConfigError):
    """Another process has the run's folder, or another run has its name."""


def this_process() -> Owner:
    """This process as an owner."""
    since = datetime.now().isoformat(sep=" ", timespec="seconds")
    return {"claim": uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "since": since}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[tuple[Owner, Owner]]:
    """Locks the folder within the block, creating it if needed; yields this owner and the previous one, if known.

    A run inside a sweep's folder takes a shared lock on the sweep's, so the two never run at once. A folder that is
    still empty at the end is removed. Raises Taken, without waiting, if another process has the lock.
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
    """Opens and locks a file; None if the file system has no locks."""
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
    """Whether the path still names this open file: its folder may have been removed meanwhile."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def taken(name: str, owner: Owner) -> Taken:
    """The error, with what is known of the owner."""
    who = "another process"
    if owner:
        who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
    return Taken(f"{name!r} is being run by {who}; wait until it ends, stop it, or choose another --name")


def _owner(file: IO[bytes]) -> Owner:
    file.seek(0)
    return _parsed(file.read())


def _parsed(text: bytes) -> Owner:
    """The owner that a record names; empty if the record is cut short."""
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    return {}


@contextlib.contextmanager
def claimed(url: str, name: str, us: Owner, before: Owner) -> Iterator[None]:
    """Claims the run `name` below a storage URL within the block.

    `before` is the previous owner of the local folder's lock: its claim is void, since that lock is ours now. Raises
    Taken if another claim was renewed within STALE_SECONDS.
    """
    claim = Claim(url, name, us)
    claim.take(before)
    try:
        yield
    finally:
        claim.release()


def _beginning(name: str) -> str:
    """The prefix of the names of all claims to a run."""
    return f".{name}.claim-"


class Claim:
    """A file `.NAME.claim-ID.json` beside a run's folder behind a URL that names its owner; a thread renews it.

    Each process first writes its own file and then looks for others. A store with read-after-write consistency (S3 and
    Google Cloud Storage have it) shows at least the later of two processes the other's file, so two never both pass.
    The claim is not in the run's folder: removing the folder could then remove another process's claim.
    """

    def __init__(self, url: str, name: str, us: Owner) -> None:
        from pyarrow.fs import FileSystem

        self.fs, self.above = FileSystem.from_uri(url)
        self.name, self.us = name, us
        self.path = self._path(us)
        self._over = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True)

    def take(self, before: Owner) -> None:
        """Writes the claim. Raises Taken if another process has one."""
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
        """Removes the claim."""
        self._over.set()
        self._renewing.join()
        with contextlib.suppress(OSError):  # it will expire
            self._remove(self.path)

    def _path(self, owner: Owner) -> str:
        return f"{self.above}/{_beginning(self.name)}{owner['claim']}.json"

    def _write(self, held: bool) -> None:
        with self.fs.open_output_stream(self.path) as file:
            file.write(json.dumps(self.us | {"held": held, "renewed": time.time()}).encode())

    def _read(self, path: str) -> Owner | None:
        """The owner that the file names; None if there is no such file."""
        try:
            with self.fs.open_input_stream(path) as file:
                return _parsed(file.read())
        except FileNotFoundError:
            return None

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(path)

    def _others(self) -> list[Owner]:
        """Other processes' claims to this run or to its sweep that have not expired; those that have are removed."""
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
                    print(f"{self.name} was taken over while its storage was unreachable: stopping", file=sys.stderr)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._write(held=True)
            except OSError:  # unreachable storage: once it is back, the next read tells whether the run was taken over
                continue
