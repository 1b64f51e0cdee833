"""Measures the machine's limits: the time of one decoding step's matrix products, and the memory bandwidth.

The products run the fastest way that PyTorch has: weights packed once by oneDNN on a CPU, cuBLAS on a GPU. Each layer
has its own weights, so they are read from memory as in a model. The rest of a step is not counted.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.peers.task import DecodeTask
from bench.turns import Unsupported
from gptcore.config import ModelConfig
from gptcore.engine.torch_runner import packed_linear
from gptcore.package import open_package

STEPS = 20
WEIGHT_AND_CACHE_BYTES = {"bfloat16": (2, 2), "float32": (4, 4), "int8": (1, 2), "int4": (0.5, 2)}
"""Of each number, by precision; scales of quantised weights are not counted."""
READ_BYTES = 1 << 30


@dataclass(frozen=True)
class Floor:
    """The result of one turn."""

    step_seconds: float
    """Time of the matrix products of one step, the median of several."""
    bandwidth: float
    """Bytes per second of one large read."""
    prompt_seconds: float | None = None
    """Time of the matrix products of all prompts, if asked for; their last tokens alone go through the output head."""


def open_floor(task: DecodeTask, precision: str, prompts: bool = False) -> tuple[Callable[[], Floor], str]:
    """Prepares the measurements, for the package's shape and the task's batch; `prompts` takes as much memory again."""
    dtype, device = getattr(torch, precision), torch.device(task.device)
    torch.set_num_threads(task.threads)
    config = open_package(Path(task.package), verify=False).config
    products = [_product(task.batch, o, i, dtype, device) for o, i in matrices(config)]
    rows = task.batch * task.prompt_tokens
    ahead = [_product(rows, o, i, dtype, device) for o, i in matrices(config)[:-1]] + products[-1:] if prompts else []
    large = torch.ones(READ_BYTES // 4, device=device)

    def run_all(chosen: list[Callable[[], Tensor]]) -> None:
        for product in chosen:
            product()

    def measured(chosen: list[Callable[[], Tensor]], times: int) -> float:
        return statistics.median(_seconds(partial(run_all, chosen), device) for _ in range(times))

    def run_turn() -> Floor:
        read = min(_seconds(large.sum, device) for _ in range(3))
        return Floor(measured(products, STEPS), READ_BYTES / read, measured(ahead, 1) if prompts else None)

    return run_turn, "matrix products alone, " + ("oneDNN, packed once" if device.type == "cpu" else "cuBLAS")


def matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """(out, in) of each product of a step. q, k and v are one product, gate and up are one; the output head is last."""
    C, M, D = config.hidden_size, config.intermediate_size or 0, config.head_size
    up = 2 * M if config.rotary else M
    layer = [((config.num_heads + 2 * config.kv_heads) * D, C), (C, config.num_heads * D), (up, C), (C, M)]
    return layer * config.num_layers + [(config.vocab_size, C)]


def step_bytes(config: ModelConfig, batch: int, length: float, precision: str) -> float:
    """Bytes that a step of `batch` sequences reads: every matrix once, and the keys and values of each sequence.

    `length` is the mean number of tokens per sequence over the steps.
    """
    weight_bytes, cache_bytes = WEIGHT_AND_CACHE_BYTES[precision]
    kv = 2 * config.num_layers * config.kv_heads * config.head_size * length * batch
    return weight_bytes * sum(o * i for o, i in matrices(config)) + cache_bytes * kv


def _product(batch: int, out: int, width: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    weight = torch.randn(out, width, device=device).to(dtype)
    x = torch.randn(batch, width, device=device).to(dtype)
    if device.type != "cpu":
        return lambda: torch.nn.functional.linear(x, weight)
    if not torch.backends.mkldnn.is_available():
        raise Unsupported("this torch has no oneDNN")
    return partial(packed_linear(weight, rows=batch), x)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
