"""From a config to what the loop eats: tokenizer, token shards, model shape and, when fine-tuning, the parent.

In: a TrainConfig. Out: `Inputs`, and a `GPT` with the run's initial weights. Everything found here is content-addressed
or pinned, so a worker on another machine, or a resumed run, comes to the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gptcore.config import ModelConfig
from gptcore.errors import ConfigError
from gptcore.home import home
from gptcore.hub import resolve
from gptcore.model import GPT
from gptcore.package import Package, open_package
from gptcore.tokenizer import Tokenizer, load_tokenizer
from train_job.config import TrainConfig
from train_job.corpus import Corpus, open_corpus, split
from train_job.shards import TokenSet, prepare

VOCAB_MULTIPLE = 64
"""Embedding rows are padded to a multiple of this, which matrix units like; the spare ids are never sampled."""


@dataclass(frozen=True)
class Inputs:
    """What a run is made from. `parent` is the package it is fine-tuned from, if any."""

    tokenizer: Tokenizer
    train_corpus: Corpus
    validation_corpus: Corpus
    train: TokenSet
    validation: TokenSet
    model: ModelConfig
    parent: Package | None = None


def cache_dir(config: TrainConfig) -> Path:
    """Where token shards, learned tokenizers and downloads are kept."""
    return Path(config.cache_dir).expanduser().absolute() if config.cache_dir else home() / ".cache"


def prepare_inputs(config: TrainConfig, mapper: Callable[..., Any] = map) -> Inputs:
    """Opens, splits and tokenises the corpus; `mapper` runs tokenising in parallel.

    Raises CorpusError, TokenizerError, PackageError, HubError or ConfigError: whatever is wrong is found here.
    """
    cache = cache_dir(config)
    corpus = open_corpus(config.data, config.text_column, cache)
    if config.val_data:
        train, validation = corpus, open_corpus(config.val_data, config.text_column, cache)
    else:
        train, validation = split(corpus, config.val_fraction)
    parent = open_package(resolve(config.init_from)) if config.init_from else None
    tokenizer = parent.tokenizer if parent else load_tokenizer(config.tokenizer, train.documents)
    shape = _child_shape(config, parent.config) if parent else config.model_config(_padded(tokenizer.vocab_size))
    if config.context > shape.context_length:
        raise ConfigError(
            f"sequence_length {config.context} is more than the model's context_length {shape.context_length}"
        )
    return Inputs(
        tokenizer,
        train,
        validation,
        prepare(train, tokenizer, cache, mapper),
        prepare(validation, tokenizer, cache, mapper),
        shape,
        parent,
    )


def build_model(config: TrainConfig, shape: ModelConfig, initial: dict[str, torch.Tensor] | None = None) -> GPT:
    """A GPT with weights from the seed, or with the parent's."""
    torch.manual_seed(config.seed)
    model = GPT(shape)
    if initial is not None:
        model.load_state_dict(initial)
    return model


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _child_shape(config: TrainConfig, parent: ModelConfig) -> ModelConfig:
    return replace(parent, dropout=config.model.get("dropout", 0.0))
