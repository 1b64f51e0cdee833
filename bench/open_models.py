"""The published shapes of small open models, by their names on Hugging Face's hub in lower case."""

from typing import Any

from gptcore.config import RopeScaling

OPEN_MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": dict(
        family="qwen3",
        vocab_size=151_936,
        num_layers=28,
        hidden_size=1024,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=3072,
        context_length=40_960,
        rope_theta=1e6,
        tie_embeddings=True,
    ),
    "smollm2-135m": dict(
        family="llama",
        vocab_size=49_152,
        num_layers=30,
        hidden_size=576,
        num_heads=9,
        num_kv_heads=3,
        intermediate_size=1536,
        context_length=8192,
        rope_theta=1e5,
        norm_eps=1e-5,
        tie_embeddings=True,
    ),
    "llama-3.2-1b": dict(
        family="llama",
        vocab_size=128_256,
        num_layers=16,
        hidden_size=2048,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=8192,
        context_length=131_072,
        rope_theta=5e5,
        rope_scaling=RopeScaling("llama3", 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        norm_eps=1e-5,
        tie_embeddings=True,
    ),
}
"""`ModelConfig`'s arguments."""
