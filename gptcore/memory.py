"""How much memory there is, and whether what is asked for fits: asked before it is allocated.

In come a device and sizes in bytes; `NoMemory` is raised rather than have the system end the process.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from gptcore.errors import NoMemory

CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on `device`; on a CPU, within the limit of a container (cgroup v2) too."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit, used, stat = ((CGROUP / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        cached = dict(line.split() for line in stat.splitlines())["file"]  # of files, given back when needed
        return min(free, max(0, int(limit) - int(used) + int(cached)))
    except (OSError, ValueError, KeyError):  # no cgroup, or "max", which is no limit
        return free


def require_memory(who: str, needs: Mapping[str, int], free: int) -> None:
    """Raises NoMemory, with the figures, if `needs` (what for, and how many bytes) do not fit into `free` bytes."""
    total = sum(needs.values())
    if total > free:
        parts = ", ".join(f"{size / 2**20:,.0f} for {name}" for name, size in needs.items() if size)
        raise NoMemory(
            f"{who} needs {total / 2**20:,.0f} MiB of memory ({parts}), but only {free / 2**20:,.0f} MiB of memory "
            "are free"
        )
