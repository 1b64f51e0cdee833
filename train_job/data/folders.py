"""Lists the files in a folder or matching a glob; follows links and lists each real file once.

In: a path or pattern. Out: the files sorted by name, and what was left out, with the reason.
"""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

SHOWN = 10
"""The most left-out files that are named; the rest are counted."""


@dataclass(frozen=True)
class LeftOut:
    """A file that is left out of the text, and why."""

    name: str
    why: str


def files_below(root: Path) -> tuple[list[Path], list[LeftOut]]:
    """Files below the folder, without hidden ones, and what was left out. Raises OSError for an unreadable folder."""
    return _once(_below(root.absolute()), root.absolute())


def files_matching(pattern: str) -> tuple[list[Path], list[LeftOut]]:
    """Files that the glob matches, and what was left out."""
    parts = Path(pattern).absolute().parts
    fixed = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    rest = parts[fixed:]
    if "**" in rest and not any(part.startswith(".") for part in rest):  # glob does not stop at circular links
        root = Path(*parts[:fixed])
        below = _below(root) if root.is_dir() else iter(())
        found = (path for path in below if _matches(path.relative_to(root).parts, rest))
    else:
        found = (Path(name).absolute() for name in glob.iglob(pattern, recursive=True))
    return _once((path for path in found if not path.is_dir()), Path("/"))


def _matches(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the glob's parts match the path's; ** matches any number of folders."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_matches(names[n:], pattern[1:]) for n in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _below(root: Path) -> Iterator[Path]:
    """Everything in the folder and below it. Linked folders come last, so that a file's real path is preferred."""
    entered: set[str] = set()
    folders = [root]
    while folders:
        top = folders.pop(0)
        linked = []
        for folder, below, names in os.walk(top, onerror=_raise):
            if os.path.realpath(folder) in entered:
                below.clear()
                continue
            entered.add(os.path.realpath(folder))
            yield from (Path(folder, name) for name in names if not name.startswith("."))
            below[:] = sorted(name for name in below if not name.startswith("."))
            linked += [Path(folder, name) for name in below if os.path.islink(os.path.join(folder, name))]
        folders += linked


def _raise(error: OSError) -> None:
    raise error


def _once(paths: Iterable[Path], root: Path) -> tuple[list[Path], list[LeftOut]]:
    """The distinct real files, each under its path with the fewest links, sorted; and what was left out."""
    kept: dict[str, Path] = {}
    left: list[LeftOut] = []
    for path in sorted(paths, key=lambda path: (links_in(path), path.relative_to(root))):
        if path.is_file():
            kept.setdefault(os.path.realpath(path), path)
        else:
            why = (
                f"a link to {os.readlink(path)}, which does not exist"
                if path.is_symlink()
                else "neither file nor folder"
            )
            left.append(LeftOut(str(path.relative_to(root)), why))
    return sorted(kept.values(), key=lambda path: path.relative_to(root)), left


def links_in(path: Path) -> int:
    """The number of links on the path to the file."""
    return path.is_symlink() + links_to(path.parent)


@lru_cache(maxsize=4096)
def links_to(folder: Path) -> int:
    """The number of links on the path to the folder."""
    return links_in(folder) if folder != folder.parent else 0


def summarize(left: Sequence[LeftOut]) -> str:
    """The left-out files in one line: `2 files: a.png (a PNG picture), b (empty)`."""
    names = ", ".join(f"{file.name} ({file.why})" for file in left[:SHOWN])
    more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
    return f"{len(left)} {'file' if len(left) == 1 else 'files'}: {names}{more}"
