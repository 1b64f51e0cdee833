"""Bits per byte: the score that compares models with different tokenizers."""

import math
from pathlib import Path

import pytest

from gptcore.config import ModelConfig
from gptcore.model import GPT
from gptcore.package import Package, save_package
from gptcore.tokenizer import Tokenizer
from train_job.data.corpus import open_corpus
from train_job.training.evaluate import bits_per_byte


def uniform_package(folder: Path, tokenizer: Tokenizer, training: dict[str, int]) -> Package:
    """A new model. Its head of zeros makes all 320 tokens equally likely."""
    config = ModelConfig(vocab_size=320, hidden_size=32, num_layers=1, num_heads=2, context_length=64)
    return save_package(folder, config, GPT(config).state_dict(), tokenizer, training)


def test_an_untrained_model_needs_log2_of_the_vocabulary_bits_per_token(
    tmp_path: Path, byte_tokenizer: Tokenizer, text_file: Path
) -> None:
    package = uniform_package(tmp_path / "package", byte_tokenizer, {})
    corpus = open_corpus(str(text_file), cache_dir=tmp_path)
    tokens, size = text_file.stat().st_size + 1, text_file.stat().st_size  # its bytes, and the end of the text
    assert bits_per_byte(package, corpus, tmp_path) == pytest.approx(math.log2(320) * tokens / size)


def test_windows_are_as_long_as_the_sequences_of_training(
    tmp_path: Path, byte_tokenizer: Tokenizer, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = GPT.forward

    def spy(self, tokens, *rest):
        seen.append(tokens.size(1))
        return forward(self, tokens, *rest)

    monkeypatch.setattr(GPT, "forward", spy)
    package = uniform_package(tmp_path / "package", byte_tokenizer, {"sequence_length": 16})
    bits_per_byte(package, open_corpus(str(text_file), cache_dir=tmp_path), tmp_path)
    assert set(seen) == {16}
