"""The memory settings of a training process, the peak speed of its device, and its memory use."""

import resource
import sys

import torch

from train_job.training.devices import device_called

WORKER_ENV = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_ARENA_MAX": "1"}
"""Tells glibc to keep freed memory when training on a CPU. By default it returns blocks of megabytes to the kernel and
gets them back page by page, which can take longer than the computation."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device in FLOP/s, or None if unknown."""
    if device.type != "cuda":
        return None
    listed = device_called(torch.cuda.get_device_name(device))
    return listed.flops if listed else None


def peak_memory_mb(device: torch.device | None = None) -> dict[str, float]:
    """Peak resident memory of this process and, on a GPU, peak allocated device memory, in MiB."""
    scale = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    figures = {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale}
    if device is not None and device.type == "cuda":
        figures["gpu_memory"] = torch.cuda.max_memory_allocated(device) / 2**20
    return figures
