"""Atomic file writes and locks, with one message for a full disk.

A file is written to a draft in the same folder and then renamed. Its writer locks the draft, so drafts that a killed
process left behind can be recognised and removed.
"""

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from gptcore.errors import RecordError, StorageFull, TrainingError

LONGEST_NAME = 200
"""Bytes in a name that comes from the user; file systems allow 255, and our prefixes and suffixes need some."""
DRAFT = ".draft-"
SETTLED_SECONDS = 60.0
"""A draft changed within this time is never removed: its writer may be about to lock or rename it."""


FULL = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)


def storage_problem(error: BaseException, place: object) -> TrainingError | None:
    """The error to show if `error` says that the storage at `place` is full or not writable; else None.

    Libraries word it differently, but all of them have the error number.
    """
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"(?:os error|errno) (\d+)", str(error))):
        number = int(found[1])
    if number in FULL or "No space left on device" in str(error):
        return StorageFull(f"the disk that holds {place} is full; free some space there")
    if number in UNWRITABLE:
        return TrainingError(f"cannot write to {place}: {os.strerror(number)}")
    return None


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Reads an object from a JSON file. Raises RecordError, with the remedy, if it has none."""
    try:
        content = path.read_bytes()
        found = json.loads(content)
    except FileNotFoundError:
        raise RecordError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}; {remedy}") from None
    except (ValueError, RecursionError):
        raise RecordError(f"{path} is {'damaged' if content.strip() else 'empty'}; {remedy}") from None
    if not isinstance(found, dict):
        raise RecordError(f"{path} is damaged; {remedy}")
    return found


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Opens a binary file for an atomic write: it appears at `path` only if the block succeeds.

    Creates the folder. Raises TrainingError, naming the folder, if it is full or not writable.
    """
    draft = path.with_name(f"{DRAFT}{uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
        os.replace(draft, path)
    except OSError as error:
        problem = storage_problem(error, path.parent)
        if isinstance(problem, StorageFull):
            raise problem from error
        if error.filename is None:  # raised by something the block was reading
            raise
        raise problem or TrainingError(f"cannot write to {path.parent}: {error.strerror}") from error
    finally:
        if draft.is_file():
            draft.unlink()


def sweep(folder: Path) -> None:
    """Removes drafts below `folder` whose writers have died; drafts that may be in use stay."""
    for draft in folder.rglob(f"{DRAFT}*"):
        with suppress(OSError), open(draft, "r+b") as file:  # locked, already removed, or another user's
            if time.time() - os.fstat(file.fileno()).st_mtime > SETTLED_SECONDS:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                draft.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path` within the block, and waits for it; a process that dies releases it.

    Creates the file and its folder. Raises TrainingError if it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise TrainingError(f"cannot write to {path.parent}: {error.strerror}") from error
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
