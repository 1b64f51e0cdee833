"""What each part of the benchmark runs: at full size on a GPU, or tiny, so that a CPU can run the same code."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.open_models import OPEN_MODELS
from train_job.config import TrainConfig, build_config


@dataclass(frozen=True)
class TrainingRun:
    """One row of the training table."""

    name: str
    settings: dict[str, Any]
    """Of train_job.config, on top of a bf16 run of some steps."""
    vocab_size: int = 50304


@dataclass(frozen=True)
class Sizes:
    """The sizes of all parts."""

    runs: tuple[TrainingRun, ...]
    peer_batch: tuple[int, int]
    """Sequences of 1,024 tokens per forward pass of the peer's loop, and passes per step."""
    peer_sequences: tuple[int, ...]
    """How many sequences transformers decodes together."""
    planned: tuple[str, ...]
    """Names of the runs whose step the plan predicts."""
    preset: str
    """The package that decodes."""
    vocab_size: int
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    steps: int
    """Training steps per row; the first third warms up."""
    checked: dict[str, Any] = field(default_factory=dict)
    """Shape of the models in the correctness checks."""


QWEN3_06B = {name: value for name, value in OPEN_MODELS["qwen3-0.6b"].items() if name != "vocab_size"}
QWEN3_06B["context_length"] = 2048


def _run(name: str, micro: int, accumulate: int, **settings: Any) -> TrainingRun:
    preset = name.partition(",")[0]
    return TrainingRun(
        name, dict(preset=preset, micro_batch_size=micro, batch_size=micro * accumulate, compile=True) | settings
    )


FULL = Sizes(
    runs=(
        _run("gpt2-124m", 32, 2),
        _run("gpt2-124m, activation checkpointing", 32, 2, checkpoint_activations=True),
        _run("foundry-124m", 32, 2),
        _run("foundry-124m, activation checkpointing", 32, 2, checkpoint_activations=True),
        _run("foundry-124m, not compiled", 32, 2, compile=False),
        TrainingRun(
            "Qwen3-0.6B's shape",
            QWEN3_06B | dict(micro_batch_size=8, batch_size=16, compile=True),
            vocab_size=151936,
        ),
    ),
    peer_batch=(32, 2),
    peer_sequences=(1, 16),
    planned=("gpt2-124m", "foundry-124m", "foundry-124m, not compiled"),
    preset="foundry-124m",
    vocab_size=50257,
    batches=(1, 4, 16, 64, 256),
    prompt_tokens=128,
    new_tokens=128,
    steps=18,
    checked=dict(vocab_size=4096, context_length=512, hidden_size=256, num_layers=4, num_heads=4),
)
_SMALL: dict[str, Any] = dict(num_layers=2, hidden_size=64, num_heads=2, context_length=64)
TINY = Sizes(
    runs=(
        _run("gpt2-124m", 2, 2, compile=False, **_SMALL),
        _run("foundry-124m", 2, 2, compile=False, **_SMALL),
        _run("foundry-124m, activation checkpointing", 2, 2, compile=False, checkpoint_activations=True, **_SMALL),
    ),
    peer_batch=(1, 1),
    peer_sequences=(2,),
    planned=("foundry-124m",),
    preset="quick",
    vocab_size=2048,
    batches=(1, 2),
    prompt_tokens=16,
    new_tokens=8,
    steps=3,
    checked=dict(vocab_size=300, context_length=64, hidden_size=64, num_layers=2, num_heads=2),
)


def config_of(settings: dict[str, Any], steps: int) -> TrainConfig:
    """The settings of a run of `steps` steps in bf16, with six logs and no evaluation on the way."""
    limits = dict(max_steps=steps, max_tokens=None, max_epochs=None)
    return build_config(
        dict(precision="bf16"), settings, limits, dict(log_interval=max(1, steps // 6), eval_interval=10 * steps)
    )


class RandomTokens:
    """A token stream in memory that looks like a TokenSet: uniform ids, one byte per token."""

    fingerprint = "random"
    holds_conversations = False

    def __init__(self, vocab_size: int, num_tokens: int) -> None:
        self.ids = np.random.default_rng(0).integers(0, vocab_size, num_tokens, dtype=np.int64)
        self.num_tokens = self.num_bytes = num_tokens
        self.num_targets = num_tokens - 1

    def read(self, start: int, length: int) -> np.ndarray:
        """int64 (length,)."""
        return self.ids[start : start + length]

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """int64 (n, length)."""
        return np.stack([self.read(start, length) for start in starts])
