"""Decoding speed of the engine: tokens/s for 1 to 256 sequences, and the share of the bandwidth floor."""

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.floor import step_bytes
from bench.gpu.shapes import Sizes
from bench.gpu.training import attempt
from bench.weights import random_package
from gptcore.package import Package
from train_job.planning.rates import decode_times

READ_BYTES, READS = 2**30, 10


def measure(device: torch.device, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Each batch size with the engine's row."""
    bandwidth = read_bandwidth(device)
    yield {"read_gigabytes_per_second": round(bandwidth / 1e9, 1)}
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        package = random_package(Path(scratch) / "package", sizes.preset, sizes.vocab_size)
        for batch in sizes.batches:
            yield {"decoding": {str(batch): attempt(partial(row, package, batch, bandwidth, device, sizes), device)}}


def row(package: Package, batch: int, bandwidth: float, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """The medians of one batch size. The floor is the time to read all weights and the cache once."""
    prompt, step = decode_times(package, batch, sizes.prompt_tokens, sizes.new_tokens, str(device))
    length = sizes.prompt_tokens + sizes.new_tokens / 2
    floor = step_bytes(package.config, batch, length, "bfloat16") / bandwidth
    return {
        "tokens_per_second": round(batch / step, 1),
        "step_ms": round(step * 1e3, 3),
        "prompts_ms": round(prompt * 1e3, 2),
        "share_of_floor": round(floor / step, 3),
    }


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s of large reads one after the other, the best of five."""
    large = torch.ones(READ_BYTES // 4, device=device)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(READS):
            total = large.sum()
        total.item()
        times.append(time.perf_counter() - start)
    return READS * READ_BYTES / min(times)
