"""Compares training speeds: `python -m bench.training --preset gpt2-124m`.

The bare loop of a job (train_job.training, without Ray) and a plain loop around transformers' AutoModelForCausalLM take
turns, each in its own process with the environment of a training worker. Both start with the same random weights in a
preset's shape, see the same batches of random tokens, and have equal settings: precision, batch, context, fused AdamW
with the same decay, clipped gradients, no dropout. Their losses must agree. It prints one JSON line last.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.command import print_report
from bench.decode import machine
from bench.gpu.shapes import RandomTokens
from bench.peers import TRANSFORMERS
from bench.turns import Contestant, RunTurn, cores, median_ratio, run_in_turn
from bench.weights import GPT2_VOCAB_SIZE, random_package
from gptcore.devices import pick_dtype
from gptcore.errors import ConfigError
from gptcore.package import describe, open_package
from train_job.config import TrainConfig, build_config
from train_job.data.inputs import build_model
from train_job.data.packing import training_batches
from train_job.training.events import Progress
from train_job.training.hardware import WORKER_ENV
from train_job.training.loop import Trainer

OURS, PEER = "ours", "transformers"
CPU = torch.device("cpu")
AGREE = 0.01
"""By how much of it the losses of a turn may differ: roundings differ, and bf16 has three digits."""


@dataclass(frozen=True)
class TrainingTask:
    """Some steps from the package's weights on; the next turn goes on from there."""

    package: str
    batch: int
    context: int
    steps: int
    threads: int
    precision: str

    @property
    def config(self) -> TrainConfig:
        """The settings of both loops. The learning rate stays the same."""
        limits = dict(max_steps=10**6, max_tokens=None, max_epochs=None, log_interval=1, eval_interval=10**6)
        sizes = dict(batch_size=self.batch, micro_batch_size=self.batch, sequence_length=self.context)
        rates = dict(optimizer="adamw", learning_rate=6e-4, warmup_steps=0, schedule="wsd")
        return build_config(dict(preset="gpt2-124m", precision=self.precision), sizes, rates, limits)

    def tokens(self, vocab_size: int) -> RandomTokens:
        """The text of both."""
        return RandomTokens(vocab_size, 64 * self.batch * self.context + 1)


@dataclass(frozen=True)
class TrainingTurn:
    """The result of one turn: its tokens per second, and the mean loss in nats."""

    rate: float
    loss: float


def main(argv: list[str] | None = None) -> int:
    """Prints the figures and the JSON line. Returns 2 for bad input."""
    arguments = parse(argv)
    return print_report(lambda scratch: measure(arguments, scratch))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2-124m", help="shape of the model")
    parser.add_argument("--vocab-size", type=int, default=GPT2_VOCAB_SIZE)
    parser.add_argument("--batch", type=int, default=2, help="sequences in a step")
    parser.add_argument("--context", type=int, default=256, help="tokens of a sequence")
    parser.add_argument(
        "--precision", default="auto", choices=["auto", "bf16", "fp32"], help="of both; auto as in a job"
    )
    parser.add_argument("--steps", type=int, default=1, help="steps in a turn")
    parser.add_argument("--turns", type=int, default=5, help="rounds that count, after one for warm-up")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads of both")
    arguments = parser.parse_args(argv)
    for name in ("batch", "context", "steps", "turns", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; expected at least 1")
    if arguments.vocab_size < 300:
        parser.error(f"--vocab-size is {arguments.vocab_size}; expected at least 300")
    return arguments


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures both in turn, prints a line for each, and returns the report. Raises ConfigError for a long context."""
    package = random_package(scratch / "package", arguments.preset, arguments.vocab_size)
    if arguments.context > package.config.context_length:
        raise ConfigError(
            f"--context is {arguments.context}; expected at most {package.config.context_length}, that of "
            f"{arguments.preset}"
        )
    precision = "bf16" if pick_dtype(arguments.precision, CPU) == torch.bfloat16 else "fp32"
    sizes = {name: getattr(arguments, name) for name in ("batch", "context", "steps", "threads")}
    task = TrainingTask(str(package.path), precision=precision, **sizes)
    hardware = machine(arguments.threads, "cpu")
    print(
        f"{describe(package).splitlines()[0]}\n{hardware['cpu']}, {arguments.threads} threads, {precision}", flush=True
    )
    contestants = [
        Contestant(OURS, precision, open_ours, environment=WORKER_ENV),
        Contestant(PEER, precision, open_transformers, TRANSFORMERS, WORKER_ENV),
    ]
    results = run_in_turn(contestants, task, arguments.turns)
    turns: dict[str, list[TrainingTurn]] = {
        one.name: results.turns[one.label] for one in contestants if one.label in results.turns
    }
    found = {}
    for name, of in turns.items():
        rates = [turn.rate for turn in of]
        found[name] = {
            "tokens_per_second": round(statistics.median(rates), 1),
            "spread": (round(min(rates), 1), round(max(rates), 1)),
            "losses": [round(turn.loss, 4) for turn in of],
        }
        print(
            f"{name:14}{found[name]['tokens_per_second']:10.1f} tokens/s   loss {of[0].loss:.4f} to {of[-1].loss:.4f}"
        )
    report = {"bench": "training", "preset": arguments.preset, "precision": precision, "machine": hardware, **sizes}
    report |= {"turns": arguments.turns, "contestants": found, "absent": results.absent}
    if PEER in turns:
        for ours, theirs in zip(turns[OURS], turns[PEER], strict=True):
            if abs(ours.loss - theirs.loss) > AGREE * theirs.loss:
                raise SystemExit(f"the losses differ: {ours.loss:.4f} of ours, {theirs.loss:.4f} of {PEER}")
        rate_of = {name: [turn.rate for turn in of] for name, of in turns.items()}
        report["ratio"] = round(median_ratio(rate_of[OURS], rate_of[PEER]), 3)
        print(f"ratio         {report['ratio']:10.3f}", flush=True)
    return report


# --- the contestants --------------------------------------------------------------------------------------------


def open_ours(task: TrainingTask, _: str) -> tuple[RunTurn, str]:
    """The loop of a job."""
    torch.set_num_threads(task.threads)
    config, package = task.config, open_package(Path(task.package), verify=False)
    model = build_model(config, package.config, dict(package.parameters(dtype=None)))
    text: Any = task.tokens(package.config.vocab_size)
    trainer = Trainer(config, model, text, text, CPU)
    trainer.evaluate = lambda untrained=False: None  # type: ignore[method-assign, assignment, return-value]
    steps = (event for event in trainer.run() if isinstance(event, Progress))
    return turns_of(task, (event.loss for event in steps)), f"torch {torch.__version__}"


def open_transformers(task: TrainingTask, precision: str) -> tuple[RunTurn, str]:
    """A plain loop."""
    import transformers

    torch.set_num_threads(task.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = task.config
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(task.package, dtype=torch.float32).train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)]
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    text: Any = task.tokens(model.config.vocab_size)
    batches = training_batches(text, config.context, config.batch_size, config.seed, config.stride)

    def losses() -> Iterator[float]:
        for number in itertools.count():
            tokens, targets = batches.batch(number)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = model(tokens, labels=targets, shift_labels=targets, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    note = f"transformers {transformers.__version__}, {model.config._attn_implementation} attention"
    return turns_of(task, losses()), note


def turns_of(task: TrainingTask, losses: Iterator[float]) -> RunTurn:
    """A turn takes the next steps, of each of which `losses` gives the loss."""

    def run_turn() -> TrainingTurn:
        start = time.perf_counter()
        found = list(itertools.islice(losses, task.steps))
        seconds = time.perf_counter() - start
        return TrainingTurn(task.steps * task.batch * task.context / seconds, statistics.fmean(found))

    return run_turn


if __name__ == "__main__":
    sys.exit(main())
