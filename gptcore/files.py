"""Files and folders that appear whole or not at all, and file hashes.

Both are written beside their place under a hidden name and renamed, so a reader never sees a part of them and a killed
writer leaves only a hidden entry behind.
"""

import hashlib
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sha256(file: Path) -> str:
    """The file's SHA-256 in hex, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_file(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write `content` to `path` at once, replacing an earlier file. Raises OSError."""
    beside = _beside(path)
    beside.touch(mode)
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path, replace: bool = True) -> Iterator[Path]:
    """An empty folder to fill, renamed to `folder` if the block ends without an error, else deleted.

    An existing `folder` is replaced, or kept if `replace` is false: another process was faster. Raises OSError.
    """
    beside = _beside(folder)
    beside.mkdir(parents=True)
    try:
        yield beside
        if replace and folder.exists():
            old = beside.with_name(f"{beside.name}.old")
            folder.rename(old)
            beside.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
            return
        try:
            beside.rename(folder)
        except OSError:
            if replace or not folder.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
