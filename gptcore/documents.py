"""Text files and JSON that anybody may have written: in comes a path, out comes the content, or one error of ours.

Only regular files are opened, as a pipe would be waited for; none is read that is larger than what it could be; and
JSON is refused that Python's parser would die of, or that other readers would understand otherwise.
"""

import json
from pathlib import Path
from typing import Any

from gptcore.errors import FoundryError, PackageError, excerpt

MOST_BYTES = 1 << 21
"""Of a config or a manifest: 2 MiB, some hundred times more than they have."""


def require_regular(file: Path, kind: type[FoundryError] = PackageError) -> None:
    """Raises an error of that kind unless `file` is a regular file, or a link to one."""
    try:
        if file.is_file():
            return
        there, link = file.exists(), file.is_symlink()
    except OSError as error:  # a name that no file can have
        raise kind(f"{excerpt(str(file))} cannot be read: {error.strerror}") from error
    if there:
        raise kind(f"{file} is no regular file")
    raise kind(f"{file} is a link to a file that is not there: fetch it again" if link else f"{file} is missing")


def read_text(file: Path, most: int = MOST_BYTES, kind: type[FoundryError] = PackageError) -> str:
    """The file's text, which is UTF-8 of at most `most` bytes; raises an error of that kind if it is not."""
    require_regular(file, kind)
    try:
        size = file.stat().st_size
        if size > most:
            raise kind(f"{file} is unreadable: it has {size:,} bytes; expected at most {most:,}")
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise kind(f"{file} is unreadable: {error}") from error


def read_json(file: Path, most: int = MOST_BYTES, kind: type[FoundryError] = PackageError) -> dict[str, Any]:
    """The JSON object in the file. Raises an error of that kind for anything else, and for a key that is said twice."""
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
