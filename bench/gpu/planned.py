"""The plan against what was measured: seconds and memory of a training step, with rates assumed and measured."""

from typing import Any

import torch

from bench.gpu.shapes import Sizes, TrainingRun, config_of
from bench.gpu.training import attempt
from train_job.planning import rates
from train_job.planning.costs import training_memory, training_step, workload
from train_job.training.devices import Device, Rates, assumed_rates, device_called

WITHIN = 0.25
"""How far a prediction may be off."""


def measure(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Each planned run with predicted over measured seconds and memory."""
    rows = {run.name: row(run, sizes.steps, device) for run in sizes.runs if run.name in sizes.planned}
    return {"plan": rows, "within": WITHIN}


def row(run: TrainingRun, steps: int, device: torch.device) -> dict[str, Any]:
    """Ratios of one run; `assumed` is None where the device is not listed."""
    measured = attempt(run, steps, device)
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
    return {
        "seconds": round(seconds, 4),
        "measured_rates": ratio(here, speed),
        "assumed_rates": ratio(listed, assumed_rates(listed)) if listed else None,
        # The allocator does not count CUDA's context; on a CPU there is no such figure.
        "memory": round((memory.total - memory.reserve) / 2**30 / measured["peak_memory_gib"], 3)
        if device.type == "cuda"
        else None,
    }
