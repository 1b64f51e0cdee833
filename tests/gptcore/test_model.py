"""The network agrees with transformers on random weights, in both directions, and with itself when cached."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gptcore.config import FAMILIES, ModelConfig
from gptcore.hf_format import parse_config
from gptcore.loss import IGNORE
from gptcore.model import GPT, KVCache
from gptcore.package import open_package, save_package
from gptcore.rotary import rotary_tables
from gptcore.tokenizer import Tokenizer, save_tokenizer

MakeModel = Callable[[ModelConfig], GPT]
LLAMA = dict(
    model_type="llama", vocab_size=300, num_hidden_layers=1, intermediate_size=64, num_key_value_heads=2, head_dim=64
)


def tokens(config: ModelConfig, length: int | None = None) -> torch.Tensor:
    return torch.randint(0, 257, (2, length or config.context_length))


def test_transformers_computes_the_logits_of_our_package(
    config: ModelConfig, random_model: MakeModel, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model, x = random_model(config), tokens(config)
    save_package(tmp_path / "p", config, model.state_dict(), byte_tokenizer, {})
    published = AutoModelForCausalLM.from_pretrained(tmp_path / "p").eval()
    with torch.no_grad():
        torch.testing.assert_close(published(x).logits, model(x), atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "p").encode("Ω or not") == byte_tokenizer.encode("Ω or not")


STRETCHED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, all settings": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
        "truncate": False,
    },
    "yarn, DeepSeek's scales": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
    },
    "yarn, the original context unnamed": {"rope_type": "yarn", "factor": 2.0},
    "an old name for the kind": {"type": "linear", "factor": 2.0},
}


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("rope", STRETCHED.values(), ids=STRETCHED)
def test_rotary_tables_are_transformers_far_beyond_the_original_context(rope: dict[str, Any], theta: float) -> None:
    shape: dict[str, Any] = dict(hidden_size=128, num_attention_heads=2, max_position_embeddings=131_072)
    config = AutoConfig.for_model("llama", **shape, rope_theta=theta, rope_scaling=dict(rope))
    positions = torch.tensor([[0, 1, 15, 16, 17, 4095, 4096, 40_000, 131_071]])
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    ours = rotary_tables(parse_config(shape | LLAMA | {"rope_theta": theta, "rope_scaling": rope}))
    for table, cosine in zip(ours, expected, strict=True):
        torch.testing.assert_close(table[positions[0]], cosine[0], atol=1e-6, rtol=0)


def theirs_gpt2(**changes: Any) -> GPT2LMHeadModel:
    shape: dict[str, Any] = dict(vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.2)
    return GPT2LMHeadModel(GPT2Config(**{**shape, **changes}))


def theirs(family: str, **changes: Any) -> PreTrainedModel:
    shape: dict[str, Any] = dict(
        vocab_size=300, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    )
    more: dict[str, Any] = dict(num_key_value_heads=4, head_dim=16, max_position_embeddings=64)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shape, **more, **changes}))


@pytest.mark.parametrize(
    "build",
    [
        theirs_gpt2,
        lambda: theirs_gpt2(tie_word_embeddings=False, n_inner=96, layer_norm_epsilon=1e-3),
        lambda: theirs("qwen3"),
        lambda: theirs("qwen3", tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        lambda: theirs("qwen3", num_key_value_heads=1, head_dim=32, rms_norm_eps=1e-3),
        lambda: theirs("qwen2", tie_word_embeddings=True),
        lambda: theirs("qwen2", num_key_value_heads=2, rope_parameters=dict(STRETCHED["yarn"], rope_theta=1e6)),
        lambda: theirs("llama", num_key_value_heads=2, rope_parameters=dict(STRETCHED["llama3"], rope_theta=5e5)),
        lambda: theirs("llama", tie_word_embeddings=True, rope_parameters=dict(STRETCHED["linear"], rope_theta=1e4)),
        lambda: theirs("mistral", sliding_window=None, num_key_value_heads=2, head_dim=32),
        lambda: theirs("mistral", sliding_window=64),
    ],
    ids=[
        "gpt2",
        "gpt2-untied",
        "qwen3",
        "qwen3-tied",
        "qwen3-gqa",
        "qwen2-tied",
        "qwen2-yarn",
        "llama3",
        "llama-linear",
        "mistral",
        "mistral with a window as long as the context",
    ],
)
def test_we_compute_the_logits_of_a_model_saved_by_transformers(
    build: Callable[[], torch.nn.Module], byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    saved = build().eval()
    with torch.no_grad():
        for name, p in saved.named_parameters():
            p.normal_(mean=float("norm" in name or "ln_" in name), std=0.1)
    saved.save_pretrained(tmp_path)  # type: ignore[operator]
    save_tokenizer(byte_tokenizer, tmp_path)
    ours = open_package(tmp_path).load_model()
    x = tokens(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), saved(x).logits, atol=1e-4, rtol=0)


def test_a_model_saved_and_opened_again_is_the_same(
    config: ModelConfig, random_model: MakeModel, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = random_model(config)
    package = save_package(tmp_path / "p", config, model.state_dict(), byte_tokenizer, {})
    again = package.load_model()
    assert package.config == config
    assert not again.training
    assert (again.lm_head.weight is again.embed_tokens.weight) == config.tie_embeddings
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    x = tokens(config)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("chunks", [(64,), (1,) * 64, (5, 1, 1, 30, 2, 25)], ids=["whole", "one by one", "mixed"])
def test_cached_decoding_equals_the_full_forward(
    config: ModelConfig, random_model: MakeModel, chunks: tuple[int, ...]
) -> None:
    model, x = random_model(config), tokens(config)
    cache = KVCache(config, batch_size=2)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in x.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(x), atol=1e-4, rtol=0)


def test_texts_in_one_row_are_computed_as_each_alone(config: ModelConfig, random_model: MakeModel) -> None:
    model, x = random_model(config), tokens(config)
    lengths = (20, 1, 30, 13)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand_as(x)
    with torch.no_grad():
        alone = torch.cat([model(text) for text in x.split(lengths, dim=1)], dim=1)
        torch.testing.assert_close(model(x, positions=positions), alone, atol=1e-5, rtol=0)


def test_no_token_sees_a_later_one(config: ModelConfig, random_model: MakeModel) -> None:
    model, x = random_model(config), tokens(config)
    changed = x.clone()
    changed[:, 40:] = (x[:, 40:] + 1) % 257
    with torch.no_grad():
        torch.testing.assert_close(model(changed)[:, :40], model(x)[:, :40], atol=1e-6, rtol=0)


def test_the_loss_is_the_summed_cross_entropy_of_the_targets_that_count(
    config: ModelConfig, random_model: MakeModel
) -> None:
    model, x, y = random_model(config), tokens(config), tokens(config)
    y[:, ::3] = IGNORE
    logprobs = model(x).log_softmax(dim=-1)
    expected = -sum(logprobs[b, t, y[b, t]] for b, t in (y != IGNORE).nonzero().tolist())
    torch.testing.assert_close(model(x, y), expected, rtol=1e-5, atol=0)


def test_a_model_without_qkv_bias_has_frozen_zeros_there(random_model: MakeModel) -> None:
    model = random_model(ModelConfig(family="gpt2", qkv_bias=False, vocab_size=300, hidden_size=64, num_layers=1))
    biases = {n: p for n, p in model.named_parameters() if n.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))}
    assert len(biases) == 3
    assert all(not p.requires_grad and not p.any() for p in biases.values())


def test_half_precision_keeps_positions_in_fp32_and_stays_near(
    config: ModelConfig, random_model: MakeModel, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model, x = random_model(config), tokens(config)
    half = save_package(tmp_path / "p", config, model.state_dict(), byte_tokenizer, {}).load_model(dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert all(b.dtype == torch.float32 for b in half.buffers())
    with torch.no_grad():
        assert (half(x).float() - model(x)).abs().mean() < 0.05


def test_a_network_without_weights_does_not_import_torchs_compiler() -> None:
    """The import would add two seconds to every run and every start of a service."""
    code = (
        "import sys\n"
        "from gptcore.config import ModelConfig\n"
        "from gptcore.hf_format import empty_model\n"
        f"for family in {FAMILIES}:\n"
        "    empty_model(ModelConfig(family=family, vocab_size=257, context_length=8, num_layers=1, num_heads=1))\n"
        "print([name for name in ('sympy', 'torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
