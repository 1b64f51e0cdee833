"""GPUs' data-sheet figures, and the share of them that training and serving are assumed to reach.

In: a name such as "h200". Out: a `Device`, and `Rates`: assumed ones here, measured ones in `train_job.planning.rates`.
"""

import re
from dataclasses import dataclass

from gptcore.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Device:
    """One GPU (or a machine's CPU) and its links. A link's bytes/s count one direction."""

    name: str
    flops: float
    """Dense bf16 peak in FLOP/s, without sparsity."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes/s of the memory."""
    link: float
    """Bytes/s of one GPU to the others of its machine."""
    network: float
    """Bytes/s of one GPU to other machines: its share of the machine's network cards."""
    per_machine: int = 8
    """1 for a CPU or an Apple GPU."""
    price: float | None = None
    """Dollars per GPU-hour, on demand; None where no index lists it."""


# Data sheets; the SXM variant if there are several. Network: 400 Gb/s per GPU in H100 and newer machines, 200 for the
# A100, 100 for cards in ordinary servers. Prices: the median of GPU clouds in May 2026.
DEVICES = (
    Device("B200", 2250e12, 180e9, 8.0e12, 900e9, 50e9),
    Device("H200", 989e12, 141e9, 4.8e12, 450e9, 50e9, price=4.0),
    Device("H100 PCIe", 756e12, 80e9, 2.0e12, 64e9, 25e9),
    Device("H100", 989e12, 80e9, 3.35e12, 450e9, 50e9, price=3.0),
    Device("A100", 312e12, 80e9, 2.0e12, 300e9, 25e9, price=1.3),
    Device("L40S", 362e12, 48e9, 0.86e12, 32e9, 12.5e9),
    Device("L4", 121e12, 24e9, 0.30e12, 32e9, 12.5e9),
    Device("A10G", 70e12, 24e9, 0.60e12, 32e9, 12.5e9),
    Device("RTX 4090", 165e12, 24e9, 1.01e12, 32e9, 12.5e9),
    Device("RTX 3090", 71e12, 24e9, 0.94e12, 16e9, 12.5e9),
)


@dataclass(frozen=True)
class Rates:
    """Sustained rates of a device, in operations or bytes per second."""

    products: float
    """FLOP/s in the matrix products of training."""
    elementwise: float
    """Bytes/s in the elementwise operations of training."""
    softmax: float
    """Bytes/s in the loss over the vocabulary."""
    decode_bandwidth: float
    """Bytes/s at which decoding reads weights and cache."""
    decode_products: float
    """FLOP/s when decoding many sequences together."""
    prefill_products: float
    """FLOP/s when processing prompts."""
    source: str
    """How the rates were obtained, as printed."""


def find_device(name: str) -> Device:
    """Finds a device by name, ignoring case and punctuation: h200, H100-PCIe, rtx4090. Raises ConfigError."""
    known = {_plain(device.name): device for device in DEVICES}
    if _plain(name) not in known:
        listed = [device.name.lower().replace(" ", "-") for device in DEVICES]
        raise ConfigError(
            f"gpu is {name!r}; expected here (this machine's device, measured), or {', '.join(listed)}."
            + did_you_mean(name.lower(), ["here", *listed])
        )
    return known[_plain(name)]


def device_called(name: str) -> Device | None:
    """Finds a device by torch's longer name, such as "NVIDIA H100 80GB HBM3"; None if it is not listed."""
    words = (re.compile(rf"\b{device.name}\b") for device in DEVICES)
    return next((device for device, word in zip(DEVICES, words, strict=True) if word.search(name)), None)


def assumed_rates(device: Device) -> Rates:
    """Assumed shares of the data-sheet figures; docs/scaling.md compares them with published runs."""
    return Rates(
        products=0.6 * device.flops,
        elementwise=0.8 * device.bandwidth,
        softmax=0.8 * device.bandwidth,
        decode_bandwidth=0.6 * device.bandwidth,
        decode_products=0.3 * device.flops,
        prefill_products=0.4 * device.flops,
        source="assumed from its data sheet, not measured",
    )


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
