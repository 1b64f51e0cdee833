"""Checks before an allocation whether enough memory is free.

`NoMemory` is raised instead of letting the system kill the process.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from gptcore.errors import NoMemory

CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Free bytes on `device`; on a CPU, also within a container's limit (cgroup v2)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit, used, stat = ((CGROUP / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        cached = dict(line.split() for line in stat.splitlines())["file"]  # the page cache, freed when needed
        return min(free, max(0, int(limit) - int(used) + int(cached)))
    except (OSError, ValueError, KeyError):  # no cgroup, or "max": no limit
        return free


def require_memory(who: str, needs: Mapping[str, int], free: int) -> None:
    """Raises NoMemory, with the figures, if `needs` (purpose to bytes) exceed `free` bytes."""
    total = sum(needs.values())
    if total > free:
        parts = ", ".join(f"{size / 2**20:,.0f} for {name}" for name, size in needs.items() if size)
        raise NoMemory(
            f"{who} needs {total / 2**20:,.0f} MiB of memory ({parts}), but only {free / 2**20:,.0f} MiB of memory "
            "are free"
        )
