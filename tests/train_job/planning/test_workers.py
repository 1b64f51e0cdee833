"""The plan's memory, against two real workers of one run on this machine's CPU."""

import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.gpu.shapes import RandomTokens
from gptcore.hf_format import empty_model
from gptcore.model import GPT
from tests.memory import allocated, multiplies_bf16
from tests.train_job.training.workers import Workers, workers
from train_job.config import TrainConfig, build_config
from train_job.planning.costs import FRAGMENTATION, GPU_RESERVE, training_memory, workload
from train_job.training.loop import Trainer
from train_job.training.parallel import local

VOCABULARY, LENGTH, SEQUENCES = 4096, 640, 8
"""At this length attention is fused on a CPU, as it is on a GPU."""
WITHIN = 0.15


@pytest.fixture(scope="module")
def crew() -> Iterator[Workers]:
    with workers(2) as ready:
        yield ready


def config_of(settings: dict[str, Any]) -> TrainConfig:
    shape = dict(hidden_size=256, num_layers=4, num_heads=2, context_length=LENGTH)
    return build_config(shape, dict(batch_size=SEQUENCES, micro_batch_size=2, max_steps=3, precision="bf16"), settings)


def measured(settings: dict[str, Any]) -> tuple[int, int]:
    """Bytes of this worker's weights, gradients and optimizer state, and the most that two steps allocate.

    A step has two micro-batches, so that gradients are there while the second one's activations are.
    """
    config = config_of(settings)
    shape = config.model_config(VOCABULARY)
    tokens: Any = RandomTokens(VOCABULARY, 10_000)
    held = 0

    def work() -> Trainer:
        nonlocal held
        sharded = config.parallel == "fsdp"
        empty = empty_model(shape)
        weights = ((name, torch.randn(p.shape) / 50) for name, p in empty.named_parameters())
        trainer = Trainer(
            config,
            empty if sharded else GPT(shape),
            tokens,
            tokens,
            torch.device("cpu"),
            weights=weights if sharded else (),
        )
        update = trainer.optimizers.step

        def count(factor: float) -> None:
            nonlocal held
            parameters = [*trainer.parameters.values()]
            kept = [
                *parameters,
                *(p.grad for p in parameters if p.grad is not None),
                *trainer.optimizers.tensors().values(),
            ]
            held = sum(local(t).numel() * t.element_size() for t in kept)
            update(factor)

        trainer.optimizers.step = count  # type: ignore[method-assign]
        for step in range(2):
            trainer._step(step)
        return trainer

    peak, _ = allocated(work)
    return held, peak


RUNS: dict[str, dict[str, Any]] = {
    "ddp": dict(),
    "ddp, recomputed": dict(checkpoint_activations=True),
    "fsdp": dict(parallel="fsdp"),
    "fsdp, recomputed": dict(parallel="fsdp", checkpoint_activations=True),
    "fsdp, bf16 sums": dict(parallel="fsdp", reduce_precision="bf16", family="gpt2", optimizer="adamw"),
    "fsdp, gpt2, recomputed": dict(parallel="fsdp", family="gpt2", optimizer="adamw", checkpoint_activations=True),
}


FAST = ("ddp", "fsdp, recomputed")
"""The others take 10 to 20 seconds each, too."""


@multiplies_bf16
@pytest.mark.parametrize("run", [pytest.param(run, marks=() if run in FAST else pytest.mark.slow) for run in RUNS])
def test_a_workers_memory_is_what_the_plan_says(crew: Workers, run: str):
    config = config_of(RUNS[run])
    memory = training_memory(config, workload(config.model_config(VOCABULARY), LENGTH), 2)
    expected = memory.total - GPU_RESERVE - (1 - 1 / FRAGMENTATION) * (memory.activations + memory.loss)
    # On a CPU, a peak depends on when the threads that send let go of their buffers: thrice, and the median.
    found = [each for _ in range(3) for each in crew.call(2, measured, RUNS[run])]
    for held, _ in found:
        assert held == pytest.approx(memory.weights + memory.gradients + memory.optimizer, rel=0.01)
    assert statistics.median(peak for _, peak in found) == pytest.approx(expected, rel=WITHIN)
