"""Chooses on how many GPUs a run trains, and how they share the model, where the user leaves that open.

In: a config and what of it the user gave, a workload, a device. Out: a `Choice`: the fewest GPUs on which the run fits
the memory, with DDP if it fits like that, else with FSDP.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from gptcore.units import gib
from train_job.config import PARALLEL, TrainConfig
from train_job.planning.costs import Workload, largest_micro_batch, micro_batch, training_memory
from train_job.training.devices import Device


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why."""

    config: TrainConfig
    gpus: int
    reasons: tuple[str, ...]
    """Empty if the user gave everything."""
    flags: str
    """What to add to the run's other flags."""


def choose(config: TrainConfig, given: Collection[str], work: Workload, device: Device, gpus: int | None) -> Choice:
    """Takes the first that fits of 1, 2, 4 … GPUs, each with DDP and then FSDP; if none fits, the last."""
    if gpus is None and "num_workers" in given:
        gpus = config.workers[1]
    counts = [gpus] if gpus else doublings(config.batch_size) if device.per_machine > 1 else [1]
    tried = [
        (count, replace(config, parallel=mode))
        for count in counts
        for mode in ([config.parallel] if "parallel" in given or count == 1 else PARALLEL)
    ]
    fitting = ((count, one) for count, one in tried if most_sequences(one, given, work, count, device))
    count, chosen = next(fitting, tried[-1])
    most = most_sequences(chosen, given, work, count, device)
    reasons = [f"{count} GPU{'s' if count > 1 else ''}, {'the fewest that fit' if most else 'and none fits'}"]
    if gpus or device.per_machine == 1:
        reasons = []
    if "parallel" not in given and count > 1:
        whole = training_memory(replace(config, parallel="ddp"), work, count, 1).total
        why = f"since ddp needs {gib(whole)} GiB" if chosen.parallel == "fsdp" else "since the whole model fits"
        reasons.append(f"{chosen.parallel}, {why}")
    flags = f"--num-workers {count} --use-gpu{' --parallel fsdp' if chosen.parallel == 'fsdp' else ''}"
    if 0 < most < micro_batch(config, count):
        chosen = replace(chosen, micro_batch_size=most)
        reasons.append(f"{most} sequence{'s' if most > 1 else ''} at a time, the most that fit")
        flags += f" --micro-batch-size {most}"
    return Choice(chosen, count, tuple(reasons), flags)


def most_sequences(config: TrainConfig, given: Collection[str], work: Workload, gpus: int, device: Device) -> int:
    """The sequences that a GPU processes at once, 0 if they do not fit; fewer than the preset's, but not the user's."""
    wanted, most = micro_batch(config, gpus), largest_micro_batch(config, work, gpus, device)
    if "micro_batch_size" in given:
        return wanted if most >= wanted else 0
    return min(wanted, most)


def doublings(most: int) -> list[int]:
    """1, 2, 4 and so on up to `most`, and `most`."""
    return sorted({*(2**n for n in range(most.bit_length()) if 2**n <= most), most})
