"""Measures the error of `train_job.plan`: `python -m bench.plan` compares each prediction with a measurement.

Every round measures the machine's rates on parts of one small model, then trains and serves whole models of other
shapes in separate processes, and compares their seconds per step with the plan's. Medians over the rounds; one JSON
line last.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu.shapes import RandomTokens
from bench.weights import random_package
from gptcore.devices import pick_device
from gptcore.model import GPT
from train_job.config import TrainConfig, build_config
from train_job.planning.costs import decode_seconds, training_step, workload
from train_job.planning.rates import decode_times, measure_in_subprocess
from train_job.training.devices import Device, Rates
from train_job.training.events import Progress
from train_job.training.hardware import WORKER_ENV
from train_job.training.loop import Trainer

Settings = Mapping[str, Any]
Measured = Callable[[str], tuple[Device, Rates]]
"""The device and its rates, by family."""
TRAINED: dict[str, tuple[Settings, int]] = {
    "quick": (dict(preset="quick"), 2048),
    "quick, twice as deep": (dict(preset="quick", num_layers=8), 2048),
    "quick, twice as wide": (dict(preset="quick", hidden_size=512, num_heads=4), 2048),
    "quick, GPT-2's vocabulary": (dict(preset="quick", num_layers=2), 50304),
    "gpt2 family, AdamW": (dict(preset="tiny", hidden_size=256, num_layers=6, context_length=256), 4096),
}
"""The models to train: (settings, vocabulary size)."""
SERVED: dict[str, tuple[str, int]] = {
    "gpt2-124m, one sequence": ("gpt2-124m", 1),
    "gpt2-124m, four": ("gpt2-124m", 4),
    "foundry-124m, sixteen": ("foundry-124m", 16),
}
"""The models that decode: (preset, sequences)."""
SECONDS = 4.0
WITHIN = 0.25
"""The largest relative error that a prediction may have."""
PROMPT, NEW = 64, 48  # tokens
VOCABULARY = 50257


def main(argv: list[str] | None = None) -> int:
    """Prints a line per model and the JSON line. Returns 0 if every prediction is within a quarter, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    found = measure(arguments.rounds)
    print(json.dumps({"bench": "plan", "predicted_over_measured": found}))
    return int(any(abs(ratio - 1) > WITHIN for ratio in found.values()))


def measure(rounds: int, trained: Sequence[str] = tuple(TRAINED), served: Sequence[str] = tuple(SERVED)) -> Settings:
    """For each model, predicted over measured seconds: the median of the rounds."""
    ratios: dict[str, list[float]] = {}
    for _ in range(rounds):
        rates = functools.cache(measure_in_subprocess)  # only of the families that these models belong to
        expected = {name: predict_training(rates, *TRAINED[name]) for name in trained}
        expected |= {name: predict_serving(rates, *SERVED[name]) for name in served}
        for name, predicted in expected.items():
            measured = _in_a_process(name)
            ratios.setdefault(name, []).append(predicted / measured)
            print(f"{name:28} predicted {predicted * 1e3:7.1f} ms, measured {measured * 1e3:7.1f} ms", flush=True)
    return {name: round(statistics.median(values), 3) for name, values in ratios.items()}


def predict_training(rates: Measured, settings: Settings, vocabulary: int) -> float:
    """The plan's prediction of the seconds per training step."""
    config = config_of(settings)
    work = workload(config.model_config(vocabulary), config.context)
    return training_step(config, work, *rates(work.model.family), 1).seconds


def predict_serving(rates: Measured, preset: str, sequences: int) -> float:
    """The plan's prediction of the seconds per decoding step."""
    config = build_config(dict(preset=preset))
    work = workload(config.model_config(VOCABULARY), config.context)
    return decode_seconds(work, *rates(work.model.family), sequences, PROMPT + NEW / 2)


def config_of(settings: Settings) -> TrainConfig:
    return build_config(settings, dict(max_steps=10**6, log_interval=1, eval_interval=10**6))


def _in_a_process(name: str) -> float:
    """Measures seconds per step of that model, in a process with a training worker's environment."""
    command = [sys.executable, "-m", "bench.plan", "one", name]
    ended = subprocess.run(command, env=os.environ | WORKER_ENV, capture_output=True, text=True, check=True)
    return float(ended.stdout.splitlines()[-1])


def train(settings: Settings, vocabulary: int) -> float:
    """Measures the median seconds per step of the real loop on random tokens."""
    config = config_of(settings)
    tokens, device = RandomTokens(vocabulary, 200_000), pick_device(config.device)
    torch.manual_seed(config.seed)
    model = GPT(config.model_config(vocabulary))
    trainer = Trainer(config, model, tokens, tokens, device)  # type: ignore[arg-type]
    rates: list[float] = []
    for event in trainer.run():
        if isinstance(event, Progress):
            rates.append(event.tokens_per_second)
            if trainer.trained_seconds > SECONDS and len(rates) > 5:
                break
    return trainer.tokens_per_step / statistics.median(rates[2:])


def serve(preset: str, sequences: int) -> float:
    """Measures the seconds per decoding step of the real engine."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        return decode_times(random_package(Path(scratch) / "package", preset), sequences, PROMPT, NEW)[1]


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        name = sys.argv[2]
        print(train(*TRAINED[name]) if name in TRAINED else serve(*SERVED[name]))
    else:
        sys.exit(main())
