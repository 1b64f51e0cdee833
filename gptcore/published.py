"""How Hugging Face writes down our two families: the keys of config.json and the names and layout of the tensors.

Pure translation, both ways and without files: `ModelConfig` <-> config.json's dict, GPT's state <-> published tensors.
`gptcore.package` puts the results into a folder and reads them back.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptcore.config import ModelConfig
from gptcore.errors import ConfigError, PackageError, did_you_mean
from gptcore.model import GPT

GPT2_PARTS = {
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "input_layernorm": "ln_1",
    "self_attn.q_proj": "attn.c_attn",  # q, k and v lie in one matrix
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
    "norm": "ln_f",
}
"""Our module -> GPT-2's. Its `c_` matrices are stored (in, out), transposed with regard to ours."""

UNDERSTOOD: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "qwen3": {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "use_sliding_window": (False,),
        "rope_scaling": (None,),
    },
}
"""Settings of config.json that change the network, and the values that gptcore.model stands for."""


def empty_model(config: ModelConfig) -> GPT:
    """The network without memory for its weights: names and shapes only."""
    with torch.device("meta"), NoInitialisation():
        return GPT(config)


class NoInitialisation(TorchFunctionMode):
    """Leaves out torch.nn.init: for weights that are not there, it would import torch's compiler, for seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _shapes(model: GPT) -> dict[str, torch.Size]:
    """Name and shape of each stored tensor, in the model's order; a tied head is stored once, as the embedding."""
    tied = model.config.tie_embeddings
    return {name: t.shape for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def published_name(name: str, family: str) -> str:
    """Hugging Face's name of our tensor; gpt2's q, k and v share one."""
    if name == "lm_head.weight":
        return name
    if family == "qwen3":
        return f"model.{name}"
    layer, part, kind = re.fullmatch(r"(layers\.\d+\.)?(.+)\.(weight|bias)", name).groups()  # type: ignore[union-attr]
    return f"transformer.{(layer or '').replace('layers', 'h')}{GPT2_PARTS[part]}.{kind}"


def _groups(model: GPT) -> dict[str, list[str]]:
    """Published name -> our tensors that make it up, in order."""
    groups: dict[str, list[str]] = {}
    for name in _shapes(model):
        groups.setdefault(published_name(name, model.config.family), []).append(name)
    return groups


def publish(model: GPT, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors as Hugging Face lays them out, on the CPU."""
    shapes = _shapes(model)
    for name, shape in shapes.items():
        if name not in state:
            raise PackageError(f"the weights lack {name}.{did_you_mean(name, state)}")
        if state[name].shape != shape:
            raise PackageError(f"{name} has shape {tuple(state[name].shape)}; the config says {tuple(shape)}")
    tensors = {}
    for published, names in _groups(model).items():
        whole = torch.cat([state[name].detach().cpu() for name in names])
        tensors[published] = (whole.t() if _is_transposed(published) else whole).contiguous()
    return tensors


def adopt(model: GPT, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors under our names and shapes. Raises PackageError if one is missing or does not fit."""
    bare = model.config.family == "gpt2" and not any(name.startswith("transformer.") for name in tensors)
    tensors = {f"transformer.{n}" if bare and n != "lm_head.weight" else n: t for n, t in tensors.items()}
    embedding, head = published_name("embed_tokens.weight", model.config.family), "lm_head.weight"
    if (
        model.config.tie_embeddings and embedding not in tensors and head in tensors
    ):  # stored once, under the other name
        tensors[embedding] = tensors[head]
    shapes = _shapes(model)
    state: dict[str, Tensor] = {}
    for published, names in _groups(model).items():
        if published not in tensors:
            raise PackageError(f"the tensor {published} is missing.{did_you_mean(published, tensors)}")
        whole = tensors.pop(published)
        whole = whole.t() if _is_transposed(published) else whole
        expected = torch.Size([shapes[names[0]][0] * len(names), *shapes[names[0]][1:]])
        if whole.shape != expected:
            raise PackageError(f"{published} has shape {tuple(whole.shape)}, expected {tuple(expected)}")
        state.update(zip(names, whole.chunk(len(names)), strict=True))
    # GPT-2 as published carries its causal masks along; a tied head may be stored twice.
    known = re.compile(r".*\.attn\.(masked_)?bias|lm_head\.weight")
    strangers = [name for name in tensors if not known.fullmatch(name)]
    if strangers:
        raise PackageError(f"config.json has no place for the tensor {strangers[0]}")
    return state


def _is_transposed(published: str) -> bool:
    return bool(re.search(r"\.c_\w+\.weight$", published))


def published_config(c: ModelConfig) -> dict[str, Any]:
    """config.json as `transformers` writes it for this network."""
    if c.family == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": c.vocab_size,
            "n_positions": c.context_length,
            "n_ctx": c.context_length,
            "n_embd": c.hidden_size,
            "n_layer": c.num_layers,
            "n_head": c.num_heads,
            "n_inner": c.intermediate_size,
            "activation_function": "gelu_new",
            "resid_pdrop": c.dropout,
            "embd_pdrop": c.dropout,
            "attn_pdrop": c.dropout,
            "layer_norm_epsilon": c.norm_eps,
            "tie_word_embeddings": c.tie_embeddings,
            "qkv_bias": c.qkv_bias,  # ours: false says that the biases, which the layout has, stay zero
        }
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context_length,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": c.dropout,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,  # said twice: transformers 5 reads the second form, everything older the first
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "use_sliding_window": False,
        "tie_word_embeddings": c.tie_embeddings,
    }


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig that config.json describes. Raises PackageError if the network is not one of ours."""
    family = str(raw.get("model_type"))
    if family not in UNDERSTOOD:
        raise PackageError(f"model_type {family!r} is not one of {', '.join(UNDERSTOOD)}")
    rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta", 10000.0)}
    for key, values in UNDERSTOOD[family].items():
        if raw.get(key, values[0]) not in values:
            raise PackageError(f"{key} is {raw[key]!r}; only {values[0]!r} is supported")
    if rope.get("rope_type", "default") != "default":
        raise PackageError(f"rope_type is {rope['rope_type']!r}; only 'default' is supported")
    try:
        return _gpt2_config(raw) if family == "gpt2" else _qwen3_config(raw, float(rope["rope_theta"]))
    except KeyError as error:
        raise PackageError(f"the key {error} is missing") from error
    except (ConfigError, TypeError, ValueError) as error:
        raise PackageError(str(error)) from error


def _gpt2_config(raw: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        family="gpt2",
        vocab_size=raw["vocab_size"],
        context_length=raw["n_positions"],
        hidden_size=raw["n_embd"],
        num_layers=raw["n_layer"],
        num_heads=raw["n_head"],
        intermediate_size=raw.get("n_inner"),
        dropout=raw.get("resid_pdrop", 0.1),
        norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=raw.get("tie_word_embeddings", True),
        qkv_bias=raw.get("qkv_bias", True),
    )


def _qwen3_config(raw: dict[str, Any], rope_theta: float) -> ModelConfig:
    return ModelConfig(
        family="qwen3",
        vocab_size=raw["vocab_size"],
        context_length=raw["max_position_embeddings"],
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads"),
        head_dim=raw.get("head_dim", 128),
        intermediate_size=raw["intermediate_size"],
        dropout=raw.get("attention_dropout", 0.0),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        tie_embeddings=raw.get("tie_word_embeddings", False),
    )
