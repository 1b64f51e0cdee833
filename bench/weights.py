"""Makes a model package for benchmarks: seeded random weights in the shape of a preset or of an open model.

Speed does not depend on what a model has learned, so nothing is downloaded. bf16 can represent all the weights exactly,
so contestants in bf16 and in fp32 compute with the same weights.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import tiktoken
import torch

from bench.open_models import OPEN_MODELS
from gptcore.config import MODEL_PRESETS, ModelConfig, model_preset
from gptcore.errors import ConfigError, did_you_mean
from gptcore.hf_format import empty_model
from gptcore.package import Package, save_package
from gptcore.tokenizer import EOT, PATTERN, Tokenizer

GPT2_VOCAB_SIZE = 50257


def shape(name: str, vocab_size: int) -> ModelConfig:
    """The shape of a preset with this vocabulary, or of an open model with its own. Raises ConfigError."""
    if name in OPEN_MODELS:
        return ModelConfig(**OPEN_MODELS[name])
    if name in MODEL_PRESETS:
        return model_preset(name, vocab_size)
    known = [*MODEL_PRESETS, *OPEN_MODELS]
    raise ConfigError(f"no preset is called {name!r}; there are {', '.join(known)}.{did_you_mean(name, known)}")


def random_package(folder: Path, preset: str, vocab_size: int = GPT2_VOCAB_SIZE, seed: int = 0) -> Package:
    """Saves and opens a package of `preset` with random weights, those of an open model in bf16, as it is published.

    The same arguments give the same weights. Raises ConfigError for an unknown preset.
    """
    config = shape(preset, vocab_size)
    dtype = torch.bfloat16 if preset in OPEN_MODELS else torch.float32
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, like in empty_model(config).named_parameters():
        frozen = name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")) and not config.qkv_bias
        # Each layer's output is about as large as its input, so attention and MLP affect the greedy choice.
        std = like.size(1) ** -0.5 if name.endswith("proj.weight") else 0.0 if frozen else 0.02
        tensor = torch.empty(like.shape).normal_(std=std, generator=generator) if std else torch.zeros(like.shape)
        gain = "norm" in name and name.endswith("weight")
        state[name] = (tensor + 1.0 if gain else tensor).bfloat16().to(dtype)
    training = {"weights": f"random, seed {seed}"}
    return save_package(folder, config, state, made_up_tokenizer(config.vocab_size), training)


def made_up_tokenizer(vocab_size: int = GPT2_VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE with `vocab_size` made-up tokens, which needs no download.

    Most tokens are whole characters, so text streams as it does with a real vocabulary.
    """
    tokens = [bytes([b]) for b in range(256)]
    tokens += islice(_made_up_words(), vocab_size - len(tokens) - 1)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("made up", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})
    return Tokenizer(f"bpe:{len(ranks) + 1}", encoding, len(ranks))


def _made_up_words() -> Iterator[bytes]:
    """Pairs of ASCII characters, then characters of two bytes, then pairs of a two-byte and an ASCII character.

    Each is the merge of two earlier tokens.
    """
    ascii_characters = [bytes([b]) for b in range(0x20, 0x7F)]
    two_bytes = [chr(c).encode() for c in range(0x80, 0x800)]
    yield from (a + b for a in ascii_characters for b in ascii_characters)
    yield from two_bytes
    yield from (a + b for b in two_bytes for a in ascii_characters)
