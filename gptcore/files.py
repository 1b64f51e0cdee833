"""Files and folders that appear whole or not at all, and file hashes.

Both are written to a draft beside their place, flushed to the disk and renamed, so a reader never sees a part of them,
not even after a power failure. A block that fails, such as on a full disk, leaves nothing. A killed writer leaves a
draft: the lock on it is then free, so `remove_drafts` can tell it from one in use.
"""

import errno
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: packages can be read there, and drafts of killed writers stay
    fcntl = None  # type: ignore[assignment]

DRAFT = ".draft-"
OURS = re.compile(r"\.draft-[0-9a-f]{32}")
WITHOUT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What a file system answers that cannot flush a file, such as some network mounts."""
SETTLED_SECONDS = 60.0
"""A draft changed within this time is never removed: its writer may be about to lock or rename it."""


def sha256(file: Path) -> str:
    """The file's SHA-256 in hex, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_file(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write `content` to `path` at once, replacing an earlier file. Raises OSError."""
    with whole_file(path, mode) as file:
        file.write(content)


@contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """A binary file to fill, renamed to `path` if the block ends without an error, else deleted.

    Replaces an earlier file. Raises OSError.
    """
    draft = _draft(path)
    try:
        with open(draft, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            _lock(file.fileno())
            yield file
            file.flush()
            sync(file)
            draft.replace(path)  # while it is locked
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path, replace: bool = True, flush: bool = True) -> Iterator[Path]:
    """An empty folder to fill, renamed to `folder` if the block ends without an error, else deleted.

    An existing `folder` is replaced, or kept if `replace` is false: another process was faster. Without `flush`, its
    files may be damaged after a power failure. Removes the drafts beside it that killed writers left. Raises OSError.
    """
    draft = _draft(folder)
    draft.mkdir(parents=True)
    lock = os.open(draft, os.O_RDONLY)
    try:
        _lock(lock)
        remove_drafts(folder.parent)
        yield draft
        if flush:
            _flush(draft)
        if replace and folder.exists():
            old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.old")
            folder.rename(old)
            try:
                draft.rename(folder)
            except OSError:
                old.rename(folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
            return
        try:
            draft.rename(folder)
        except OSError:
            if replace or not folder.is_dir():
                raise
    finally:
        os.close(lock)
        shutil.rmtree(draft, ignore_errors=True)


def remove_drafts(folder: Path) -> None:
    """Remove the drafts in `folder` whose writers have died; those that may be in use stay."""
    for draft in folder.glob(f"{DRAFT}*") if fcntl else ():
        if not OURS.fullmatch(draft.name):
            continue
        with suppress(OSError):  # locked, already removed, or another user's
            lock = os.open(draft, os.O_RDONLY if draft.is_dir() else os.O_RDWR)
            try:
                # Another machine's lock on a folder is not always visible, but what it writes is.
                if time.time() - max(part.stat().st_mtime for part in (draft, *draft.rglob("*"))) > SETTLED_SECONDS:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
            finally:
                os.close(lock)


def _draft(path: Path) -> Path:
    return path.with_name(f"{DRAFT}{uuid.uuid4().hex}")


def _lock(descriptor: int) -> None:
    with suppress(OSError, AttributeError):  # a file system, or a system, without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _flush(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                sync(stream)


def sync(file: IO[Any]) -> None:
    """Waits until what was written is on the disk, if its file system can do that."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in WITHOUT_SYNC:
            raise
