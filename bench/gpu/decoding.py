"""Decoding speed: tokens/s for 1 to 256 sequences, the share of the bandwidth floor, and transformers beside it."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.floor import step_bytes
from bench.gpu.shapes import Sizes
from bench.weights import random_package
from gptcore.package import Package
from train_job.planning.rates import decode_times

READ_BYTES = 2**30


def measure(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Each batch size with the engine's row and, where transformers is installed, its own."""
    bandwidth = read_bandwidth(device)
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        package = random_package(Path(scratch) / "package", sizes.preset, sizes.vocab_size)
        rows = {str(batch): row(package, batch, bandwidth, device, sizes) for batch in sizes.batches}
    return {"read_gigabytes_per_second": round(bandwidth / 1e9, 1), "decoding": rows}


def row(package: Package, batch: int, bandwidth: float, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """The medians of one batch size. The floor is the time to read all weights and the cache once."""
    try:
        prompt, step = decode_times(package, batch, sizes.prompt_tokens, sizes.new_tokens)
    except Exception as error:  # such as too little memory for 256 sequences
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    length = sizes.prompt_tokens + sizes.new_tokens / 2
    floor = step_bytes(package.config, batch, length, "bfloat16") / bandwidth
    found: dict[str, Any] = {
        "tokens_per_second": round(batch / step, 1),
        "step_ms": round(step * 1e3, 3),
        "prompts_ms": round(prompt * 1e3, 2),
        "share_of_floor": round(floor / step, 3),
    }
    try:
        theirs = static_cache(package, batch, device, sizes)
    except ImportError:
        return found | {"transformers": "not installed"}
    except Exception as error:
        return found | {"transformers": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return found | {"transformers_tokens_per_second": round(theirs, 1), "ratio": round(batch / step / theirs, 2)}


def static_cache(package: Package, batch: int, device: torch.device, sizes: Sizes) -> float:
    """Tokens/s of transformers' generate with a static cache, its fastest documented way."""
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
    return batch * (sizes.new_tokens - 1) / statistics.median(differences)


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s of one large read, the best of five."""
    large = torch.ones(READ_BYTES // 4, device=device)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        large.sum().item()
        times.append(time.perf_counter() - start)
    return READ_BYTES / min(times)
