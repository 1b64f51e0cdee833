"""Describes the presets: purpose, size, and memory and time on this machine: `train_job/run.py --presets`.

In: the presets, and this machine's rates, measured for some seconds. Out: lines. `train_job.planning.costs` computes
them.
"""

from collections.abc import Sequence
from typing import Any

from gptcore.units import count, duration
from train_job.config import PRESETS, UNBOUNDED, build_config

NOTES = {
    "quick": "4.3M parameters; the default: minutes on two CPU cores",
    "chat": "357.6k parameters; learns short conversations, a byte at a time: minutes on two CPU cores",
    "gpt2-124m": "124.5M parameters; GPT-2 small as OpenAI published it; needs a GPU, better several",
    "foundry-124m": "123.6M parameters; the same size with Qwen3's layers and Muon; needs a GPU, better several",
    "tiny": "6.9M parameters; a small GPT-2: minutes on a CPU",
    "shakespeare": "124.5M parameters; GPT-2 small on tiny Shakespeare; needs a GPU",
    "story": "123.9M parameters; GPT-2 small with a short context, for one long text; needs a GPU",
    "mini": "95.7M parameters; two thirds of GPT-2 small; needs a GPU",
}
"""Sizes are written out so that `--help` does not build networks; a test checks them."""
MEASURED = "qwen3"
"""The family whose training is timed; the rates, in bytes and FLOP per second, apply to every family."""


def notes() -> list[str]:
    """A line for each preset: its name and description."""
    widest = max(map(len, NOTES))
    return [f"{name.ljust(widest)}  {what}" for name, what in NOTES.items()]


def show() -> None:
    """Measures this machine and prints the table."""
    from train_job.planning.rates import measure_in_subprocess

    print("measuring this machine for a few seconds; train_job.plan estimates other GPUs", flush=True)
    device, rates = measure_in_subprocess(MEASURED, serving=False)
    for line in table(device, rates):
        print(line)
    print("\nA run stops at its first limit; change it with --max-steps, --max-epochs, --max-tokens or --max-minutes.")


def table(device: Any, rates: Any) -> list[str]:
    """A line for each preset: shape, size, training memory, and the time of a step and of the run."""
    from train_job.planning.costs import training_memory, training_step

    rows: list[Sequence[str]] = [
        ("preset", "family", "layers", "width", "context", "parameters", "tokenizer", "memory", "a step", "a run")
    ]
    for name in PRESETS:
        config, work = _work(name)
        memory = training_memory(config, work, 1).total
        step = training_step(config, work, device, rates, 1).seconds
        fits = "" if memory <= device.memory else ", too much"
        shape = work.model
        cells = (name, shape.family, shape.num_layers, shape.hidden_size, shape.context_length, count(work.parameters))
        needs = (config.tokenizer, f"{memory / 2**30:.1f} GiB{fits}", f"{step:.2f} s", _whole(config, step))
        rows.append([*map(str, cells), *needs])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"here      {device.name}, {device.memory / 2**30:.0f} GiB",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
    ]


def _whole(config: Any, step_seconds: float) -> str:
    """The length of the run, as far as it is known without the text."""
    steps, _ = config.planned_steps()
    epochs = f"{config.max_epochs:g} epochs" if config.max_epochs else ""
    if steps == UNBOUNDED:
        return epochs
    took = steps * step_seconds
    time = duration(took) if took < 86400 else f"{took / 86400:,.0f} days"
    return f"{steps:,} steps, {time}{f', or {epochs}' if epochs else ''}"


def _work(name: str) -> tuple[Any, Any]:
    """The preset's config and its workload."""
    from gptcore.tokenizer import parse_tokenizer
    from train_job.data.inputs import padded
    from train_job.planning.costs import workload

    config = build_config({"preset": name})
    return config, workload(config.model_config(padded(parse_tokenizer(config.tokenizer))), config.context)
