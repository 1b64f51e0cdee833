"""What the machine can do: the device to train on, the precision it is fast in, its peak, and the memory used.

In: a config. Out: a torch device, a dtype, figures. Knows torch alone.
"""

import resource
import sys

import torch

from gptcore.errors import ConfigError
from train_job.config import TrainConfig
from train_job.devices import device_called

WORKER_ENV = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_ARENA_MAX": "1"}
"""What glibc is told where a CPU trains: to keep the memory it was given. By default every block of megabytes goes back
to the kernel when it is freed, and comes anew page by page, which can take longer than the mathematics."""


def pick_device(config: TrainConfig, local_rank: int = 0) -> torch.device:
    """The device that `config.device` means here. Raises ConfigError if there is none of that kind."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = config.device if config.device != "auto" else next(d for d, there in present.items() if there)
    if not present[name]:
        raise ConfigError(f"device is {name!r}, but torch sees no such device here; use auto or cpu")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def pick_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """bf16 where the device has fast instructions for it, else fp32; `precision` overrides."""
    if config.precision != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device in FLOP/s, or None where it is not known."""
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
