"""Files that appear whole or not at all: atomic writes and cached downloads, with one message for a full disk."""

import errno
import hashlib
import http.client
import os
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

from gptcore.errors import CorpusError, TrainingError

DOWNLOAD_TIMEOUT = 20.0  # seconds without a byte


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes its name only once the block has ended well; its folder is made if need be.

    Raises TrainingError naming the folder when it is full or not writable.
    """
    draft = path.with_name(f".{uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as file:
            yield file
        os.replace(draft, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TrainingError(f"the disk that holds {path.parent} is full; free some space there") from error
        if error.filename is None:  # not about this file's name or folder: whatever the block was reading
            raise
        raise TrainingError(f"cannot write to {path.parent}: {error.strerror}") from error
    finally:
        if draft.is_file():
            draft.unlink()


def sha256(path: Path) -> str:
    """The file's SHA-256 in hex, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, path: Path) -> Path:
    """`url`'s content at `path`, fetched if it is not there yet. Raises CorpusError if the address does not answer."""
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as answer, written_whole(path) as file:
            shutil.copyfileobj(answer, file)
            expected = int(answer.headers.get("Content-Length") or file.tell())
            if file.tell() != expected:
                raise OSError(f"{file.tell()} of {expected} bytes came")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise CorpusError(f"cannot download {url}: {getattr(error, 'reason', error)}") from error
    return path
