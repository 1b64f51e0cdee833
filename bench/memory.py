"""What an open model takes in memory, to serve and to tune: `python -m bench.memory [--preset NAME]`.

Makes the model with random weights, opens it in an engine with one slot, and trains adapters beside it as a worker
does, each in a process of its own. Prints the peak memory of these processes, and the size of PEFT's adapter. Takes the
job's settings too; the defaults are one sequence of 256 tokens, adapters of rank 16, bf16 and recomputed activations.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.open_models import OPEN_MODELS
from bench.weights import random_package
from gptcore.devices import pick_dtype
from gptcore.engine.engine import Engine
from gptcore.engine.settings import EngineSettings
from gptcore.hf_format import empty_model
from gptcore.lora import add_adapters, initial_adapters, is_adapter, save_adapter
from gptcore.package import open_package
from gptcore.weights import WEIGHTS
from train_job.cli import parse_settings
from train_job.config import build_config
from train_job.data.inputs import prepare_inputs
from train_job.training.events import Progress
from train_job.training.hardware import WORKER_ENV, peak_memory_mb
from train_job.training.loop import Trainer

DEFAULTS: dict[str, Any] = dict(
    batch_size=1,
    sequence_length=256,
    max_steps=1000,
    eval_interval=1000,
    log_interval=1,
    lora_rank=16,
    precision="bf16",
    checkpoint_activations=True,
    val_fraction=0.01,
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="qwen3-0.6b", help=f"{', '.join(OPEN_MODELS)} or one of ours")
    known, rest = parser.parse_known_args(argv)
    settings = parse_settings(rest)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "base"
        _apart(make, folder, known.preset)
        size = (folder / WEIGHTS).stat().st_size
        served = _apart(serve, folder)
        os.environ.update(WORKER_ENV)
        figures = {"base_bytes": size, **served, **_apart(tune, folder, settings, scratch)}
    print(f"{known.preset}: {size / 2**20:,.0f} MiB of weights")
    print(f"  to serve, with one slot {figures['serve_peak_bytes'] / 2**20:8,.0f} MiB at most")
    print(f"  to tune                 {figures['tune_peak_bytes'] / 2**20:8,.0f} MiB at most")
    print(f"  a step                  {figures['step_seconds']:8.1f} s")
    print(f"  the adapter             {100 * figures['adapter_bytes'] / size:8.1f} % of the base")
    print(json.dumps(figures))
    return 0


def make(folder: Path, preset: str) -> None:
    """Writes the model."""
    random_package(folder, preset)


def serve(folder: Path) -> dict[str, float]:
    """Opens the model as a service on a CPU does."""
    settings = EngineSettings(slots=1, max_context=1024, device="cpu", dtype="bfloat16")
    Engine(open_package(folder), settings).close()
    return {"serve_peak_bytes": peak_memory_mb()["memory"] * 2**20}


def tune(folder: Path, settings: dict[str, Any], scratch: str) -> dict[str, float]:
    """Trains adapters beside the model; the text comes with Python."""
    config = build_config(DEFAULTS, {"data": "builtin", "cache_dir": scratch}, settings, {"init_from": str(folder)})
    assert config.lora
    inputs = prepare_inputs(config)
    assert inputs.parent
    device, model = torch.device("cpu"), empty_model(inputs.model)
    add_adapters(model, config.lora, pick_dtype(config.precision, device))
    weights = chain(inputs.parent.parameters(dtype=None), initial_adapters(inputs.model, config.lora, config.seed))
    trainer = Trainer(inputs.config, model, inputs.train, inputs.validation, device, weights=weights)
    trainer.evaluate = lambda untrained=False: None  # type: ignore[method-assign, assignment, return-value]
    steps = (event for event in trainer.run() if isinstance(event, Progress))
    next(steps)
    clock = time.perf_counter()
    next(steps)
    seconds = time.perf_counter() - clock
    adapters = {name: p.detach() for name, p in trainer.parameters.items() if is_adapter(name)}
    save_adapter(Path(scratch) / "adapter", inputs.parent, "base", adapters, config.lora)
    return {
        "tune_peak_bytes": peak_memory_mb()["memory"] * 2**20,
        "step_seconds": seconds,
        "adapter_bytes": sum(file.stat().st_size for file in (Path(scratch) / "adapter").iterdir()),
    }


def _apart(work: Callable[..., Any], *args: Any) -> Any:
    """What `work` returns in a process of its own, whose memory is then free."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


if __name__ == "__main__":
    sys.exit(main())
