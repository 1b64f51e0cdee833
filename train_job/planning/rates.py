"""Measures this machine's rates: matrix products, elementwise operations, decoding.

Out: a `Device` and `Rates` for `train_job.planning.costs`, in a few seconds. Parts of one small reference model are
timed; `costs` derives other shapes from them. Needs only torch.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch
import torch.nn as nn

from gptcore.config import ModelConfig
from gptcore.devices import pick_device, pick_dtype
from gptcore.engine import EngineSettings, Request
from gptcore.engine.engine import Engine
from gptcore.errors import ConfigError
from gptcore.model import GPT
from gptcore.package import Package, save_package
from gptcore.sampling import SamplingParams
from gptcore.tokenizer import load_tokenizer
from train_job.planning.costs import LOGIT_BYTES, block_bytes, workload
from train_job.training.devices import Device, Rates, device_called
from train_job.training.hardware import WORKER_ENV

REPEATS, FEW_REPEATS = 9, 3
TRAINED = {
    "cpu": ModelConfig(vocab_size=4096, context_length=256, hidden_size=384, num_layers=1, num_heads=3),
    "cuda": ModelConfig(vocab_size=50304, context_length=1024, hidden_size=768, num_layers=1, num_heads=12),
}
"""The shapes that are timed, with eight sequences and two different numbers of blocks."""
LAYERS = (2, 6)
SEQUENCES = 8
SERVED = ModelConfig(vocab_size=32768, context_length=512, hidden_size=768, num_layers=8, num_heads=12)
"""Larger than CPU caches, so that decoding reads it from memory."""
BATCHES = (1, 8)
PROMPT, NEW = 128, 64  # tokens


def measure_in_subprocess(family: str, serving: bool = True) -> tuple[Device, Rates]:
    """This machine's device and rates, measured in a process that is set up like a training worker.

    Without `serving`, decoding is not measured, and the rest less often. Raises ConfigError if it cannot be measured.
    """
    command = [sys.executable, "-m", "train_job.planning.rates", family, *([] if serving else ["training"])]
    measured = subprocess.run(command, env=os.environ | WORKER_ENV, capture_output=True, text=True)
    if measured.returncode != 0:
        why = (measured.stderr.splitlines() or [f"exit code {measured.returncode}"])[-1]
        raise ConfigError(f"this machine cannot be measured: {why}")
    device, rates = json.loads(measured.stdout.splitlines()[-1])
    return Device(**device), Rates(**rates)


def measure(family: str, serving: bool = True) -> tuple[Device, Rates]:
    """Measures in this process. A GPU listed in `devices` gets its peak and links from there."""
    device = pick_device("auto")
    training = measure_training(device, family, REPEATS if serving else FEW_REPEATS)
    decode = measure_decoding(family) if serving else (math.nan, math.nan, math.nan)
    rates = Rates(*training, *decode, source="measured here")
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        unlisted = Device(found.name, training[0], found.total_memory, training[1], 32e9, 12.5e9)
        return replace(device_called(found.name) or unlisted, memory=found.total_memory), rates
    return Device(device.type, training[0], psutil.virtual_memory().total, training[1], 1.0, 1.0, 1), rates


def measure_training(device: torch.device, family: str, repeats: int = REPEATS) -> tuple[float, float, float]:
    """FLOP/s in matrix products, bytes/s in elementwise operations and in the loss, forward and backward."""
    shape = of_family(TRAINED["cuda" if device.type == "cuda" else "cpu"], family)
    dtype = pick_dtype("auto", device)
    C, T, V, tokens = shape.hidden_size, shape.context_length, shape.vocab_size, SEQUENCES * shape.context_length
    ids = torch.zeros(SEQUENCES, T, dtype=torch.long, device=device)

    def seconds(module: nn.Module, loss: Callable[[], torch.Tensor]) -> float:
        def once() -> None:
            module.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss().backward()

        return _median_seconds(once, device, repeats)

    few, many = (GPT(replace(shape, num_layers=layers)).to(device) for layers in LAYERS)
    shallow, deep = seconds(few, lambda: few(ids, ids)), seconds(many, lambda: many(ids, ids))
    products = 6 * tokens * 4 * C * C / _product_seconds(tokens, C, device, dtype, repeats)
    block = (deep - shallow) / (LAYERS[1] - LAYERS[0])
    flops = workload(shape, T).flops_per_token - 6 * V * C  # of one block
    rest = block - tokens * flops / products
    loss = shallow - LAYERS[0] * block - tokens * 6 * V * C / products
    return (
        products,
        tokens * block_bytes(shape, T, device.type) / max(rest, 0.1 * block),
        tokens * V * LOGIT_BYTES / max(loss, 0.1 * block),
    )


def _product_seconds(tokens: int, width: int, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Seconds of a linear layer from `width` to four times as many features, forward and backward."""
    linear = nn.Linear(width, 4 * width, bias=False).to(device)
    x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)

    def layer() -> None:
        linear.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            linear(x).sum().backward()

    weight, of_y = linear.weight.detach().to(dtype), torch.randn(tokens, 4 * width, device=device, dtype=dtype)
    rows = x.detach()

    def products() -> None:
        rows @ weight.T, of_y @ weight, of_y.T @ rows

    # On a GPU the products of so small a layer take less time than what autograd does around them.
    return _median_seconds(layer if device.type == "cpu" else products, device, repeats)


def _median_seconds(once: Callable[[], None], device: torch.device, repeats: int) -> float:
    calls = 1 if device.type == "cpu" else 10  # a GPU works while Python prepares the next call
    times = []
    for _ in range(repeats + 2):  # two to warm up
        start = time.perf_counter()
        for _ in range(calls):
            once()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times[2:])


def of_family(shape: ModelConfig, family: str) -> ModelConfig:
    """The same widths in another family; derived settings are computed again."""
    widths = {name: getattr(shape, name) for name in ("context_length", "hidden_size", "num_layers", "num_heads")}
    return ModelConfig(vocab_size=shape.vocab_size, family=family, **widths)


def measure_decoding(family: str) -> tuple[float, float, float]:
    """An engine's bytes/s reading weights, FLOP/s decoding sequences together, and FLOP/s in prompts."""
    shape = of_family(SERVED, family)
    work = workload(shape, shape.context_length)
    with tempfile.TemporaryDirectory(prefix="rates-") as scratch:
        package = save_package(
            Path(scratch) / "package", shape, GPT(shape).state_dict(), load_tokenizer("bytes", None), {}
        )
        timed = [decode_times(package, batch, PROMPT, NEW) for batch in BATCHES]
    prompts = statistics.median(prompt / batch for batch, (prompt, _) in zip(BATCHES, timed, strict=True))
    few, many = (step for _, step in timed)
    each = max((many - few) / (BATCHES[1] - BATCHES[0]), 1e-9)
    bandwidth = 2 * work.read_weights / max(few - each, 1e-9)
    cache = (PROMPT + NEW / 2) * work.cache_bytes / bandwidth
    return bandwidth, work.decode_flops / max(each - cache, 0.2 * each), PROMPT * work.decode_flops / prompts


def decode_times(
    package: Package, batch: int, prompt_tokens: int, new_tokens: int, device: str = "auto"
) -> tuple[float, float]:
    """Medians of five: seconds until all `batch` prompts are processed, and seconds per step after that."""
    engine = Engine(
        package,
        EngineSettings(
            slots=batch,
            prefill_tokens=batch * prompt_tokens,
            max_queue=batch,
            prefix_cache=False,
            speculation=False,
            device=device,
        ),
    )
    engine.warm_up()
    params = SamplingParams(max_new_tokens=new_tokens, temperature=0, ignore_eos=True)
    prompts, steps = [], []
    for _ in range(5):
        start = time.perf_counter()
        for number in range(batch):
            tokens = tuple((number * 31 + i) % 200 for i in range(prompt_tokens))
            engine.add(Request(str(number), tokens, params))
        engine.step()
        begun, count = time.perf_counter(), 0
        while engine.busy:
            engine.step()
            count += 1
        prompts.append(begun - start)
        steps.append((time.perf_counter() - begun) / count)
    engine.close()
    return statistics.median(prompts), statistics.median(steps)


if __name__ == "__main__":
    print(json.dumps([asdict(part) for part in measure(sys.argv[1], serving="training" not in sys.argv)]))
