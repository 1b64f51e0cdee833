"""A corpus and a model small enough to train in a second, without Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.tokenizer import Tokenizer, load_tokenizer
from train_job.config import TrainConfig, build_config
from train_job.data.inputs import Inputs, build_model, prepare_inputs
from train_job.training.loop import Trainer

SMALL = dict(
    tokenizer="bytes",
    num_layers=2,
    num_heads=2,
    hidden_size=32,
    context_length=32,
    batch_size=4,
    max_steps=12,
    eval_interval=6,
    log_interval=3,
    warmup_steps=2,
    sample_tokens=0,
)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """The tokenizer that needs nothing."""
    return load_tokenizer("bytes", None)


@pytest.fixture
def small(text_file: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes a config of the smallest model that still has every part."""

    def make(**settings: Any) -> TrainConfig:
        return build_config({"data": str(text_file), "cache_dir": str(tmp_path / "cache")} | SMALL | settings)

    return make


@pytest.fixture
def trainer(small: Callable[..., TrainConfig]) -> Callable[..., Trainer]:
    """Makes a Trainer on the CPU, in this process."""

    def make(stop_asked: Callable[[], bool] = lambda: False, **settings: Any) -> Trainer:
        config = small(**settings)
        inputs: Inputs = prepare_inputs(config)
        model = build_model(config, inputs.model)
        return Trainer(config, model, inputs.train, inputs.validation, torch.device("cpu"), stop_asked=stop_asked)

    return make
