"""The presets, told: what each is for, its size, and what it takes on this machine: `train_job/run.py --presets`.

In: the presets, and this machine's rates, measured for some seconds. Out: lines. `train_job.planning.costs` computes
them.
"""

import math
from collections.abc import Sequence
from typing import Any

from gptcore.errors import ConfigError
from gptcore.units import count, duration
from train_job.config import PRESETS, build_config

NOTES = {
    "quick": "4.3M parameters; the default: for two cores of a CPU, minutes",
    "gpt2-124m": "124.5M parameters; GPT-2 small as OpenAI published it; wants a GPU, better several",
    "foundry-124m": "123.6M parameters; as large, with Qwen3's layers and Muon; wants a GPU, better several",
    "tiny": "6.9M parameters; a small GPT-2: for a CPU, minutes",
    "shakespeare": "124.5M parameters; GPT-2 small on tiny Shakespeare; wants a GPU",
    "story": "123.9M parameters; GPT-2 small with a short context, for one long text; wants a GPU",
    "mini": "95.7M parameters; two thirds of GPT-2 small; wants a GPU",
}
"""The sizes are written out, so that `--help` need not build networks; a test counts them."""
MEASURED = "qwen3"
"""The family whose training is timed: rates are bytes and products per second, whatever asks for them."""


def notes() -> list[str]:
    """A line for each preset: its name and what it is."""
    widest = max(map(len, NOTES))
    return [f"{name.ljust(widest)}  {what}" for name, what in NOTES.items()]


def show() -> None:
    """Prints the table, after a word on why that takes a moment."""
    from train_job.planning.rates import measure_training_only

    print("measuring this machine for some seconds; train_job.plan has the same for rented GPUs", flush=True)
    device, rates = measure_training_only(MEASURED)
    for line in table(device, rates):
        print(line)
    print("\nA run's first limit ends it; give --max-steps, --max-epochs, --max-tokens or --max-minutes for another.")


def table(device: Any, rates: Any) -> list[str]:
    """A line for each preset: shape, size, memory while it trains, a step's time, and the whole run's."""
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
    """How long the run is, as far as that is known without its text."""
    limits = [config.max_steps]
    if config.max_tokens:
        limits.append(math.ceil(config.max_tokens / (config.batch_size * config.context)))
    steps = min((limit for limit in limits if limit), default=None)
    epochs = f"{config.max_epochs:g} epochs" if config.max_epochs else ""
    if steps is None:
        return epochs
    took = steps * step_seconds
    time = duration(took) if took < 86400 else f"{took / 86400:,.0f} days"
    return f"{steps:,} steps, {time}{f', or {epochs}' if epochs else ''}"


def _work(name: str) -> tuple[Any, Any]:
    """(the preset's config, what its model asks for). Raises ConfigError for an unknown name."""
    from gptcore.tokenizer import parse_tokenizer
    from train_job.data.inputs import padded
    from train_job.planning.costs import workload

    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    config = build_config({"preset": name})
    return config, workload(config.model_config(padded(parse_tokenizer(config.tokenizer))), config.context)
