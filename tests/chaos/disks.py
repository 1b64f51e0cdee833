"""Small disks that can be filled, or fail."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def mounted_disk(folder: Path, *source: str | Path) -> Iterator[bool]:
    """A disk at this folder until the block ends; False where it cannot be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0 or not mount(folder, *source):
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)


def mount(folder: Path, *source: str | Path) -> bool:
    """Whether it was mounted there, or mounted in another way."""
    return subprocess.run(["mount", *source, folder], capture_output=True).returncode == 0


def tmpfs(size: str) -> tuple[str, ...]:
    """The source of a disk of that size in memory."""
    return ("-t", "tmpfs", "-o", f"size={size}", "tmpfs")


def fill(file: Path, leave: int) -> None:
    """Adds to a file until it leaves so many bytes of its disk."""
    with contextlib.suppress(OSError), file.open("ab") as out:
        space = os.statvfs(file.parent)
        out.write(bytes(max(0, space.f_bavail * space.f_frsize - leave)))
