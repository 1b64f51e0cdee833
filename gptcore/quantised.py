"""Matrices of 8 or 4 bits: what their numbers stand for, and how a package stores them.

Of a row (one output), each GROUP columns share a scale: weight = value * scale. Values are symmetric around 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptcore.errors import PackageError, excerpt

GROUP = 32
BITS = {"int8": (8, 8), "int4": (4, 8)}
"""Scheme -> bits of the layers' matrices, and of the head's, with which a tied embedding is one."""
MOST_VALUE = 128
"""The largest absolute value."""
KINDS = {8: "I8", 4: "U8"}
"""Bits -> safetensors' type of stored values."""
SCALES = "_scales"
"""Follows a matrix's name in the name of its scales."""


@dataclass(frozen=True)
class Quantised:
    """A matrix (out, in): values (out, in / 32, 32) in int8, and their scales (out, in / 32) in bfloat16."""

    values: Tensor
    scales: Tensor

    def dequantised(self) -> Tensor:
        """What it stands for, (out, in), exactly, in float32."""
        return (self.values * self.scales.float().unsqueeze(-1)).flatten(1)

    def chunk(self, parts: int) -> "list[Quantised]":
        """Its rows in so many equal parts."""
        pairs = zip(self.values.chunk(parts), self.scales.chunk(parts), strict=True)
        return [Quantised(values, scales) for values, scales in pairs]


def joined(parts: Sequence[Quantised]) -> Quantised:
    """The matrix with the rows of all."""
    return Quantised(torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts]))


def to_stored(values: Tensor, bits: int) -> Tensor:
    """Values as they are stored. With 4 bits, byte i of a group is 8 + value i, and 16 times 8 + value i + 16."""
    if bits == 8:
        return values
    low, high = (values + 8).to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


def from_stored(stored: Tensor) -> Tensor:
    """The inverse of `to_stored`; the dtype says how many bits there are."""
    if stored.dtype == torch.int8:
        return stored
    return torch.cat((stored & 15, stored >> 4), dim=-1).to(torch.int8) - 8


def stored_shapes(name: str, shape: tuple[int, int], bits: int) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and safetensors' type of what is stored of a matrix (out, in): values, then scales.

    Values have three dimensions, so that no other program takes them for the matrix. Raises PackageError if the groups
    do not divide the rows.
    """
    rows, columns = shape
    if columns % GROUP:
        raise PackageError(f"{name} has {columns} inputs; quantised weights need a multiple of {GROUP}")
    groups = columns // GROUP
    return [(name, (rows, groups, GROUP * bits // 8), KINDS[bits]), (name + SCALES, (rows, groups), "BF16")]


def description(scheme: str) -> dict[str, Any]:
    """The scheme as foundry.json has it."""
    layers, head = BITS[scheme]
    return {"scheme": scheme, "bits": layers, "head_bits": head, "group_size": GROUP}


def scheme_of(info: dict[str, Any]) -> str:
    """The scheme in the content of foundry.json, empty without one. Raises PackageError for an unknown one."""
    if "weights" not in info:
        return ""
    given = info["weights"]
    for scheme in BITS:
        if isinstance(given, dict) and description(scheme).items() <= given.items():
            return scheme
    known = " or ".join(str(description(scheme)) for scheme in BITS)
    raise PackageError(f"weights is {excerpt(given)}; expected {known}")
