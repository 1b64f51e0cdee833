"""Reads text and JSON files from untrusted sources, with one of our errors for anything invalid.

Only regular files of limited size are opened, since a pipe could block. JSON that would crash Python's parser, or that
is ambiguous, is refused.
"""

import json
from pathlib import Path
from typing import Any

from gptcore.errors import FoundryError, PackageError, excerpt

MOST_BYTES = 1 << 21
"""Size limit of a config or manifest: 2 MiB, about a hundred times their usual size."""


def require_regular(file: Path, kind: type[FoundryError] = PackageError) -> None:
    """Raises an error of type `kind` unless `file` is a regular file, or a link to one."""
    try:
        if file.is_file():
            return
        there, link = file.exists(), file.is_symlink()
    except OSError as error:  # an invalid file name
        raise kind(f"{excerpt(str(file))} cannot be read: {error.strerror}") from error
    if there:
        raise kind(f"{file} is not a regular file")
    raise kind(f"{file} is a link to a missing file: download it again" if link else f"{file} is missing")


def read_text(file: Path, most: int = MOST_BYTES, kind: type[FoundryError] = PackageError) -> str:
    """The file's text; raises an error of type `kind` if it is not UTF-8 or has more than `most` bytes."""
    require_regular(file, kind)
    try:
        size = file.stat().st_size
        if size > most:
            raise kind(f"{file} is unreadable: it has {size:,} bytes; expected at most {most:,}")
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise kind(f"{file} is unreadable: {error}") from error


def read_json(file: Path, most: int = MOST_BYTES, kind: type[FoundryError] = PackageError) -> dict[str, Any]:
    """The JSON object in the file. Raises an error of type `kind` for anything else, and for a duplicate key."""
    text = read_text(file, most, kind)
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise kind(f"{file} is unreadable: {error}") from error
    if not isinstance(value, dict):
        raise kind(f"{file} is unreadable: expected a JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {excerpt(twice)} twice")
    return found
