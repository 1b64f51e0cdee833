"""Measures training speed on one GPU: `python -m bench.gpu_train`. torch alone, bf16, compiled.

It runs the real loop on random tokens, for `gpt2-124m` and `foundry-124m`, and reports tokens/s, the share of the
chip's peak (MFU) and peak memory. Without a GPU it says so and exits with 0.
"""

import argparse
import json
import math
import statistics

import numpy as np
import torch

from gptcore.model import GPT
from train_job.config import build_config
from train_job.training.events import Progress
from train_job.training.hardware import peak_flops
from train_job.training.loop import Trainer


class RandomTokens:
    """A token stream in memory with the interface of TokenSet: uniform ids, one byte per token."""

    fingerprint = "random"

    def __init__(self, vocab_size: int, num_tokens: int) -> None:
        self.ids = np.random.default_rng(0).integers(0, vocab_size, num_tokens, dtype=np.int64)
        self.num_tokens = self.num_bytes = num_tokens

    def read(self, start: int, length: int) -> np.ndarray:
        """int64 (length,)."""
        return self.ids[start : start + length]

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """int64 (n, length)."""
        return np.stack([self.read(start, length) for start in starts])


def main(argv: list[str] | None = None) -> int:
    """Prints a line per preset and one JSON line last."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_train", description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["gpt2-124m", "foundry-124m"])
    parser.add_argument("--micro-batch-size", type=int, default=32, help="sequences per forward pass")
    parser.add_argument("--accumulate", type=int, default=4, help="forward passes per step")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(json.dumps({"bench": "gpu_train", "skipped": "torch sees no CUDA device here"}))
        return 0
    results = {preset: measure(preset, arguments) for preset in arguments.presets}
    print(json.dumps({"bench": "gpu_train", "gpu": torch.cuda.get_device_name(), "torch": torch.__version__} | results))
    return 0


def measure(preset: str, arguments: argparse.Namespace) -> dict[str, float | None]:
    """Trains, and returns the median tokens/s of the log intervals after warm-up, MFU, memory and size."""
    config = build_config(
        dict(
            preset=preset,
            micro_batch_size=arguments.micro_batch_size,
            batch_size=arguments.micro_batch_size * arguments.accumulate,
            max_steps=arguments.steps,
            log_interval=5,
            eval_interval=10 * arguments.steps,
            compile=not arguments.no_compile,
            precision="bf16",
        )
    )
    device = torch.device("cuda", 0)
    torch.cuda.reset_peak_memory_stats(device)
    shape = config.model_config(vocab_size=50304)
    torch.manual_seed(config.seed)
    tokens = RandomTokens(50257, 4_000_000)
    validation = RandomTokens(50257, 64 * config.context + 1)
    trainer = Trainer(config, GPT(shape), tokens, validation, device)  # type: ignore[arg-type]
    rates = []
    for event in trainer.run():
        if isinstance(event, Progress):
            rates.append(event.tokens_per_second)
            print(
                f"{preset} step {event.step} loss {event.loss:.3f} {event.tokens_per_second:,.0f} tokens/s", flush=True
            )
            if not math.isfinite(event.loss):
                raise SystemExit(f"{preset}: the loss is {event.loss}")
    rate, peak = statistics.median(rates[2:] or rates), peak_flops(device)
    flops = trainer.model.flops_per_token(config.context)
    return {
        "tokens_per_second": round(rate),
        "mfu": round(rate * flops / peak, 4) if peak else None,
        "peak_memory_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2),
        "parameters": trainer.model.num_parameters(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
