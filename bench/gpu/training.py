"""Training speed: tokens/s, share of the chip's peak (MFU) and peak memory of the real loop."""

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters  # tried with torch 2.13

from bench.gpu.shapes import RandomTokens, Sizes, TrainingRun, config_of
from gptcore.model import GPT
from train_job.training.events import Progress
from train_job.training.hardware import peak_flops
from train_job.training.loop import Trainer


def measure(device: torch.device, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Each run's name with its row."""
    for run in sizes.runs:
        yield {"training": {run.name: attempt(partial(train, run, sizes.steps, device), device)}}


def attempt(row: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """A row; one with an `error` if it does not fit or fails, so that the others are still measured."""
    try:
        return row()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        clean(device)


def clean(device: torch.device) -> None:
    """Frees what earlier rows left; compiled blocks and their wrappers are cycles."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def train(run: TrainingRun, steps: int, device: torch.device) -> dict[str, Any]:
    """Median tokens/s over the logs after a third of the steps, in which torch.compile works."""
    config = config_of(run.settings, steps)
    torch.manual_seed(config.seed)
    with device:
        model = GPT(config.model_config(run.vocab_size))
    tokens = RandomTokens(run.vocab_size, 100 * config.context + config.batch_size * config.context)
    validation = RandomTokens(run.vocab_size, 4 * config.context + 1)
    trainer = Trainer(config, model, tokens, validation, device)  # type: ignore[arg-type]
    rates, begun = [], time.perf_counter()
    for event in trainer.run():
        if isinstance(event, Progress):
            rates.append(event.tokens_per_second)
            if not math.isfinite(event.loss):
                raise ArithmeticError(f"the loss of step {event.step} is {event.loss}")
    if config.compile and not counters["stats"]["unique_graphs"]:
        raise RuntimeError("torch.compile compiled nothing")
    measured = {
        "tokens_per_second": statistics.median(rates[len(rates) // 3 :]),
        "flops_per_token": model.flops_per_token(config.context),
        "parameters": model.num_parameters(),
        "seconds": time.perf_counter() - begun,
    }
    return finished(measured, device)


def finished(measured: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Adds MFU and peak memory, and rounds."""
    peak = peak_flops(device)
    rate, flops = measured["tokens_per_second"], measured.pop("flops_per_token")
    return {
        "tokens_per_second": round(rate),
        "mfu": round(rate * flops / peak, 4) if peak else None,
        "peak_memory_gib": round(peak_bytes(device) / 2**30, 2),
        "parameters": measured["parameters"],
        "seconds": round(measured["seconds"], 1),
    }


def peak_bytes(device: torch.device) -> int:
    """Of the GPU since the last reset; on a CPU, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
