"""Every named shape builds, and the well-known ones have the well-known sizes."""

import pytest
import torch

from gptcore.config import MODEL_PRESETS, ModelConfig, model_preset
from gptcore.errors import ConfigError
from gptcore.model import GPT


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_every_preset_builds_a_network_that_computes_logits(name: str) -> None:
    config = model_preset(name, vocab_size=50304)
    with torch.device("meta"):
        model = GPT(config)
        logits = model(torch.zeros(2, config.context_length, dtype=torch.long))
    assert logits.shape == (2, config.context_length, 50304)


@pytest.mark.parametrize(
    ("name", "vocab_size", "millions"),
    [("gpt2-124m", 50257, 124.4), ("shakespeare", 50257, 124.4), ("foundry-124m", 50257, 123.6), ("quick", 2048, 4.26)],
)
def test_a_preset_has_the_size_in_its_name(name: str, vocab_size: int, millions: float) -> None:
    with torch.device("meta"):
        model = GPT(model_preset(name, vocab_size))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_predecessors_shapes_are_unchanged() -> None:
    story, mini, tiny = (model_preset(name, 50257) for name in ("story", "mini", "tiny"))
    assert (story.context_length, story.num_layers, story.num_heads, story.hidden_size) == (256, 12, 12, 768)
    assert (story.dropout, story.qkv_bias) == (0.1, False)
    assert (mini.num_layers, mini.num_heads, mini.hidden_size, mini.context_length) == (8, 4, 768, 512)
    assert tiny.hidden_size == 128


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'gpt2-124m'"):
        model_preset("gpt2-124", 50257)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "gpt-2"}, "Did you mean 'gpt2'"),
        ({"hidden_size": 250}, "hidden_size 250 is not divisible by num_heads 4; 248 would be"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
        ({"family": "gpt2", "num_kv_heads": 2}, "as many key/value heads as heads"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
    ],
)
def test_inconsistent_numbers_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(vocab_size=256, **changes)
