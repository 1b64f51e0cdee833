"""Small models with random weights, and packages of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.config import ModelConfig, RopeScaling
from gptcore.model import GPT
from gptcore.package import Package, save_package
from gptcore.tokenizer import Tokenizer, load_tokenizer

SHAPE: dict[str, Any] = dict(vocab_size=320, hidden_size=64, num_layers=2, num_heads=4, context_length=64)
CONFIGS = {
    "gpt2": ModelConfig(family="gpt2", **SHAPE),
    "gpt2-untied": ModelConfig(family="gpt2", tie_embeddings=False, intermediate_size=96, **SHAPE),
    "gpt2-no-qkv-bias": ModelConfig(family="gpt2", qkv_bias=False, dropout=0.1, **SHAPE),
    "qwen3": ModelConfig(family="qwen3", **SHAPE),
    "qwen3-tied": ModelConfig(family="qwen3", tie_embeddings=True, rope_theta=5e5, **SHAPE),
    "qwen3-gqa": ModelConfig(family="qwen3", num_kv_heads=2, head_dim=32, norm_eps=1e-5, **SHAPE),
    "qwen2": ModelConfig(family="qwen2", num_kv_heads=2, tie_embeddings=True, rope_theta=1e6, **SHAPE),
    "llama": ModelConfig(
        family="llama",
        num_kv_heads=1,
        rope_theta=5e5,
        rope_scaling=RopeScaling("llama3", 8.0, original_context=16, low_freq_factor=1.0, high_freq_factor=4.0),
        **SHAPE,
    ),
    "mistral": ModelConfig(family="mistral", num_kv_heads=2, head_dim=32, **SHAPE),
}


@pytest.fixture(autouse=True)
def _steady() -> Iterator[None]:
    """The same weights each time; one thread, which is faster for networks this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """Each shape in turn."""
    return CONFIGS[request.param]


@pytest.fixture(scope="session")
def random_model() -> Callable[[ModelConfig], GPT]:
    """A network in eval mode whose every free weight is random, the zero-initialised ones included."""

    def make(config: ModelConfig) -> GPT:
        model = GPT(config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.normal_(mean=float("norm" in name), std=0.1)
        return model

    return make


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return load_tokenizer("bytes")


@pytest.fixture
def package(tmp_path: Path, random_model: Callable[[ModelConfig], GPT], byte_tokenizer: Tokenizer) -> Package:
    """A saved qwen3 with grouped heads, 320 rows for 257 tokens."""
    model = random_model(CONFIGS["qwen3-gqa"])
    return save_package(tmp_path / "package", model.config, model.state_dict(), byte_tokenizer, {"steps": 3})


@pytest.fixture(scope="session")
def learn() -> Callable[[int, str], Tokenizer]:
    """A BPE of so many tokens, learned from a text."""

    def make(size: int, text: str) -> Tokenizer:
        def texts() -> Iterator[str]:
            yield text

        return load_tokenizer(f"bpe:{size}", texts)

    return make
