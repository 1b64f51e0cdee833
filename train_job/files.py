"""Files that are written whole, JSON that is read, and locks, with one message for a full disk."""

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gptcore.errors import RecordError, StorageFull, TrainingError
from gptcore.files import whole_file

LONGEST_NAME = 200
"""Bytes in a name that comes from the user; file systems allow 255, and our prefixes and suffixes need some."""
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


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


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


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file as `written_whole` does."""
    with written_whole(path) as file:
        file.write(json.dumps(value, indent=1).encode())


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Opens a binary file that appears at `path` only if the block succeeds; creates its folder.

    Raises TrainingError, naming the folder, if it is full or not writable.
    """
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            yield file


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns an OSError of writing to `folder` within the block into a TrainingError that names the folder."""
    try:
        yield
    except OSError as error:
        problem = storage_problem(error, folder)
        if isinstance(problem, StorageFull):
            raise problem from error
        if error.filename is None:  # raised by something the block was reading
            raise
        raise problem or TrainingError(f"cannot write to {folder}: {error.strerror}") from error


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
