"""Files that appear whole or not at all: atomic writes and cached downloads, with one message for a full disk.

A file is written as a draft beside its place and renamed. A draft is locked while its writer lives, so one that a
killed process left behind is told from one in use, and swept up.
"""

import errno
import fcntl
import hashlib
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
"""A draft written to within this time is left alone, lock or not: its writer may be about to lock or rename it."""


FULL = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)


def storage_problem(error: BaseException, place: object) -> TrainingError | None:
    """The error to show if this is one of the storage at `place`: full, or not to be written to. Else None.

    Libraries say it in their own ways; the number is the same.
    """
    number = getattr(error, "errno", None)
    if number is None and (told := re.search(r"(?:os error|errno) (\d+)", str(error))):
        number = int(told[1])
    if number in FULL or "No space left on device" in str(error):
        return StorageFull(f"the disk that holds {place} is full; free some space there")
    if number in UNWRITABLE:
        return TrainingError(f"cannot write to {place}: {os.strerror(number)}")
    return None


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. Raises RecordError, with the remedy, if there is none in it."""
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
    """A binary file that takes its name only once the block has ended well; its folder is made if need be.

    Raises TrainingError naming the folder when it is full or not writable.
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
        if error.filename is None:  # not about this file's name or folder: whatever the block was reading
            raise
        raise problem or TrainingError(f"cannot write to {path.parent}: {error.strerror}") from error
    finally:
        if draft.is_file():
            draft.unlink()


def sweep(folder: Path) -> None:
    """Removes the drafts below `folder` whose writers are gone. Those that may be in use stay, as does all else."""
    for draft in folder.rglob(f"{DRAFT}*"):
        with suppress(OSError), open(draft, "r+b") as file:  # locked, gone meanwhile, or another user's
            if time.time() - os.fstat(file.fileno()).st_mtime > SETTLED_SECONDS:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                draft.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within it, no other process of this machine is: waits for its turn. A process that dies lets go of the lock.

    Raises TrainingError if the file, whose folder is made if need be, cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise TrainingError(f"cannot write to {path.parent}: {error.strerror}") from error
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256(path: Path) -> str:
    """The file's SHA-256 in hex, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
