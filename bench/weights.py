"""Makes a model package for benchmarks: a preset's shape, seeded random weights, a vocabulary of GPT-2's size.

Speed does not depend on what a model has learned, so nothing is downloaded. bf16 can represent all the weights exactly,
so contestants in bf16 and in fp32 compute with the same weights.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import tiktoken
import torch

from gptcore.config import model_preset
from gptcore.hf_format import empty_model
from gptcore.package import Package, save_package
from gptcore.tokenizer import EOT, PATTERN, Tokenizer

GPT2_VOCAB_SIZE = 50257


def random_package(folder: Path, preset: str, vocab_size: int = GPT2_VOCAB_SIZE, seed: int = 0) -> Package:
    """Saves and opens a package of `preset` with random weights. The same arguments give the same weights.

    Raises ConfigError for an unknown preset.
    """
    config = model_preset(preset, vocab_size)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, like in empty_model(config).state_dict().items():
        frozen = name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")) and not config.qkv_bias
        # Each layer's output is about as large as its input, so attention and MLP affect the greedy choice.
        std = like.size(1) ** -0.5 if name.endswith("proj.weight") else 0.0 if frozen else 0.02
        tensor = torch.empty(like.shape).normal_(std=std, generator=generator) if std else torch.zeros(like.shape)
        gain = "norm" in name and name.endswith("weight")
        state[name] = (tensor + 1.0 if gain else tensor).bfloat16().float()
    return save_package(folder, config, state, made_up_tokenizer(vocab_size), {"weights": f"random, seed {seed}"})


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
