"""The plan against what was measured: seconds and memory of a training step, with rates assumed and measured."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu.shapes import Sizes, TrainingRun, config_of
from bench.gpu.training import attempt, train
from train_job.planning import rates
from train_job.planning.costs import FRAGMENTATION, training_memory, training_step, workload
from train_job.training.devices import Device, Rates, assumed_rates, device_called

WITHIN = 0.25
"""How far a prediction may be off."""


def measure(device: torch.device, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Each planned run with predicted over measured seconds and memory."""
    yield {"within": WITHIN}
    for run in sizes.runs:
        if run.name in sizes.planned:
            yield {"plan": {run.name: row(run, sizes.steps, device)}}


def row(run: TrainingRun, steps: int, device: torch.device) -> dict[str, Any]:
    """Ratios of one run; `assumed` is None where the device is not listed."""
    measured = attempt(partial(train, run, steps, device), device)
    if "error" in measured:
        return measured
    config = config_of(run.settings, steps)
    work = workload(config.model_config(run.vocab_size), config.context)
    seconds = config.batch_size * config.context / measured["tokens_per_second"]
    listed = device_called(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    here, speed = rates.measure(work.model.family, serving=False)

    def ratio(machine: Device, of: Rates) -> float:
        return round(training_step(config, work, machine, of, 1).seconds / seconds, 3)

    memory = training_memory(config, work, 1)
    gaps = (1 - 1 / FRAGMENTATION) * (memory.activations + memory.loss)
    return {
        "seconds": round(seconds, 4),
        "measured_rates": ratio(here, speed),
        "assumed_rates": ratio(listed, assumed_rates(listed)) if listed else None,
        "compiled": config.compile,
        # The allocator counts neither CUDA's context nor gaps; on a CPU there is no such figure.
        "memory": round((memory.total - memory.reserve - gaps) / 2**30 / measured["peak_memory_gib"], 3)
        if device.type == "cuda"
        else None,
    }
