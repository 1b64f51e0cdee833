"""Choose the device and the dtype from the names that settings use."""

import torch

from gptcore.errors import ConfigError, did_you_mean

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
"""dtype by its name in the settings of training and serving."""


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto": a GPU if there is one. Raises ConfigError for an unknown or absent device."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    kind, _, index = name.partition(":")
    if kind not in present or not (index.isdecimal() or not index):
        hint = did_you_mean(kind, present)
        raise ConfigError(f"device is {name!r}; expected auto, cpu, cuda, cuda:N or mps.{hint}", param="device")
    if not present[kind] or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"device is {name!r}, but torch sees no such device here; use auto or cpu", param="device")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto": bf16 if the device has instructions for it, else fp32.

    Asks a CPU with a private function of torch, tried with 2.13; tests/gptcore/engine/test_runner.py fails when it
    changes.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32
