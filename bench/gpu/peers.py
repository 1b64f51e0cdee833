"""Peers on the same GPU: GPT-2 in the shape of nanoGPT's loop, and transformers' generate with a static cache."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu.shapes import Sizes
from bench.gpu.training import attempt, finished
from bench.peers import nanogpt
from bench.weights import random_package
from gptcore.package import Package


def measure(device: torch.device, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """nanoGPT's loop with the columns of our training rows, and transformers with those of our decoding."""
    yield {"peers": {"nanoGPT's loop, GPT-2 124M, trains": attempt(partial(loop, device, sizes), device)}}
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        package = random_package(Path(scratch) / "package", sizes.preset, sizes.vocab_size)
        for batch in sizes.peer_sequences:
            row = attempt(partial(static_cache, package, batch, device, sizes), device)
            if "error" in row and row["error"].startswith(("ImportError", "ModuleNotFoundError")):
                return  # not installed
            yield {"peers": {f"transformers, static cache, decodes {batch}": row}}


def loop(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """The row of nanoGPT's loop."""
    small = sizes.steps < 6
    return finished(nanogpt.measure(*sizes.peer_batch, steps=sizes.steps, device=device, small=small), device)


def static_cache(package: Package, batch: int, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """The row of transformers' generate with a static cache, its fastest documented way."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(package.path, dtype=torch.bfloat16)
    model = model.to(device).eval()
    prompts = torch.randint(0, 200, (batch, sizes.prompt_tokens), device=device)

    def seconds(new_tokens: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                cache_implementation="static",
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(2):  # compiles
        seconds(sizes.new_tokens)
    # The difference of two lengths is decoding alone.
    differences = [seconds(sizes.new_tokens) - seconds(1) for _ in range(3)]
    return {"tokens_per_second": round(batch * (sizes.new_tokens - 1) / statistics.median(differences), 1)}
