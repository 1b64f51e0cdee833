"""Measures how long the bare loop takes to a given quality: `python -m bench.time_to_quality --data FILE --bpb 2.1203`.

The figures to beat are nanoGPT's, on the last tenth of tiny Shakespeare: 1.4697 nats per character, which is 2.1203
bits per byte, after 180 s on one A100, and 2.712 bits per byte with its CPU recipe. torch alone, no Ray. The clock
counts training steps only; the time of evaluations is reported separately. `--seeds` trains once for each, and reports
the median, the fastest and the slowest, and how many reached the quality; one that did not counts as slower than all
others. `--set` overrides settings as in train_job/run.py.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from gptcore.devices import pick_device
from gptcore.errors import ConfigError, FoundryError
from train_job.config import build_config
from train_job.data.inputs import build_model, prepare_inputs
from train_job.training.events import Evaluation, Progress
from train_job.training.hardware import WORKER_ENV
from train_job.training.loop import Trainer

# (bits per byte that the recipe reaches, settings). The first recipe that reaches the target is run.
RECIPES: list[tuple[float, dict[str, Any]]] = [
    (2.69, dict(hidden_size=128, tokenizer="bpe:1024", max_steps=80, eval_interval=80)),
    (2.11, dict(max_steps=330, eval_interval=330)),
    (0.0, dict(max_steps=600, eval_interval=100)),
]


def main(argv: list[str] | None = None) -> int:
    """Trains until the target is met. Returns 0 if it was, 1 if not, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m bench.time_to_quality", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="shakespeare", help="corpus, as for train_job/run.py")
    parser.add_argument("--bpb", type=float, default=2.1203, help="validation bits per byte to reach")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings to change from the recipe's"
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="train once with each of these")
    arguments = parser.parse_args(argv)
    try:
        if not 0 < arguments.bpb < math.inf:
            raise ConfigError(f"--bpb is {arguments.bpb:g}; expected more than 0, and finite")
        recipe = next(settings for reaches, settings in RECIPES if reaches <= arguments.bpb)
        changes = dict(map(parse_change, arguments.set))
        with tempfile.TemporaryDirectory() as cache:
            base = dict(data=arguments.data, target_bits_per_byte=arguments.bpb, log_interval=10, cache_dir=cache)
            seeds = [{"seed": seed} for seed in arguments.seeds or ()] or [{}]
            runs = [measure(base | recipe | changes | seed) for seed in seeds]
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for run in runs:
        run |= {"target": arguments.bpb, "reached": run["bits_per_byte"] <= arguments.bpb}
    print(json.dumps(summary(runs, arguments.seeds) if arguments.seeds else runs[0]))
    return 0 if all(run["reached"] for run in runs) else 1


def summary(runs: Sequence[dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """The report of several seeds; its seconds are null where the run that they are of did not reach the target."""
    seconds = sorted(run["seconds"] if run["reached"] else math.inf for run in runs)
    named = {"seconds": statistics.median(seconds), "fastest": seconds[0], "slowest": seconds[-1]}
    figures = {name: round(value, 2) if value < math.inf else None for name, value in named.items()}
    reached = sum(run["reached"] for run in runs)
    print(
        f"{reached} of {len(runs)} seeds reach {runs[0]['target']}: "
        + ", ".join(f"{k} {v}" for k, v in figures.items())
    )
    shared = {"bench": "time_to_quality", "seeds": list(seeds), "target": runs[0]["target"], **figures}
    return shared | {"reached_count": reached, "reached": reached == len(runs), "runs": runs}


def parse_change(item: str) -> tuple[str, str]:
    """Splits `KEY=VALUE` into a pair. Raises ConfigError if there is no `=`."""
    key, equals, value = item.partition("=")
    if not equals:
        raise ConfigError(f"--set has {item!r}; expected KEY=VALUE, such as max_steps=100")
    return key, value


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs the loop. Returns the last evaluation and the seconds until it."""
    config = build_config(settings)
    inputs = prepare_inputs(config)
    model = build_model(config, inputs.model)
    trainer = Trainer(config, model, inputs.train, inputs.validation, pick_device(config.device))
    evaluating, best = 0.0, math.inf
    for event in trainer.run():
        if isinstance(event, Progress):
            print(f"step {event.step} loss {event.loss:.4f} {event.tokens_per_second:.0f} tokens/s", flush=True)
        elif isinstance(event, Evaluation):
            last, evaluating, best = event, evaluating + event.seconds, min(best, event.bits_per_byte)
            print(
                f"step {event.step} {event.bits_per_byte:.4f} bits/byte after {event.trained_seconds:.1f} s", flush=True
            )
    return {
        "bench": "time_to_quality",
        "bits_per_byte": round(last.bits_per_byte, 4),
        "best_bits_per_byte": round(best, 4),
        "seconds": round(last.trained_seconds, 2),
        "evaluation_seconds": round(evaluating, 2),
        "steps": last.step,
        "tokens": last.tokens,
        "parameters": model.num_parameters(),
        "threads": torch.get_num_threads(),
        "precision": str(trainer.dtype).removeprefix("torch."),
    }


if __name__ == "__main__":
    if not os.environ.keys() >= WORKER_ENV.keys():  # the environment of a training worker
        again = [sys.executable, "-m", "bench.time_to_quality", *sys.argv[1:]]
        os.execve(sys.executable, again, os.environ | WORKER_ENV)
    sys.exit(main())
