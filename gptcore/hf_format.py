"""Converts between our names and Hugging Face's: the keys of config.json, and the names and layout of tensors.

Both directions, without files: `ModelConfig` <-> config.json's dict, GPT's state <-> published tensors.
`gptcore.package` writes and reads the files.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptcore.config import ModelConfig
from gptcore.errors import ConfigError, PackageError, did_you_mean, excerpt
from gptcore.model import GPT

GPT2_PARTS = {
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "input_layernorm": "ln_1",
    "self_attn.q_proj": "attn.c_attn",  # q, k and v are one matrix
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
    "norm": "ln_f",
}
"""Our module -> GPT-2's. Its `c_` matrices are stored as (in, out), the transpose of ours."""

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
        "partial_rotary_factor": (1.0, None),
    },
}
"""Settings of config.json that change the network, and their supported values, the default first."""

KEYS: dict[str, dict[str, str]] = {
    "gpt2": {
        "vocab_size": "vocab_size",
        "context_length": "n_positions",
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "intermediate_size": "n_inner",
        "dropout": "resid_pdrop",
        "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
        "qkv_bias": "qkv_bias",  # our own key; false: the biases exist in the layout but stay zero
    },
    "qwen3": {
        "vocab_size": "vocab_size",
        "context_length": "max_position_embeddings",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "intermediate_size": "intermediate_size",
        "dropout": "attention_dropout",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "rope_theta": "rope_theta",
    },
}
"""ModelConfig's fields -> config.json's keys."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"intermediate_size": None, "dropout": 0.1, "norm_eps": 1e-5, "tie_embeddings": True, "qkv_bias": True},
    "qwen3": {"num_kv_heads": None, "head_dim": 128, "dropout": 0.0, "norm_eps": 1e-6, "tie_embeddings": False},
}
"""transformers' defaults for keys missing in config.json; all other keys are required."""
ROPE_THETA = 10000.0


def empty_model(config: ModelConfig) -> GPT:
    """The network on the meta device: names and shapes, without memory for weights."""
    with torch.device("meta"), NoInitialisation():
        return GPT(config)


class NoInitialisation(TorchFunctionMode):
    """Skips torch.nn.init, which on the meta device would import torch's compiler and take seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _shapes(model: GPT) -> dict[str, torch.Size]:
    """Name and shape of each stored tensor, in the model's order; a tied head is stored as the embedding only."""
    tied = model.config.tie_embeddings
    return {name: t.shape for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Published name and shape of each stored tensor, in the model's order, without building the model."""
    yield from _around_layers(config, first=True)
    layer = _gpt2_layer(config) if config.family == "gpt2" else _qwen3_layer(config)
    for number in range(config.num_layers):
        for name, shape in layer.items():
            yield published_name(f"layers.{number}.{name}", config.family), shape
    yield from _around_layers(config, first=False)


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, tied ones once, without building the network."""
    return sum(prod(shape) for _, shape in tensor_shapes(config))


def _around_layers(c: ModelConfig, first: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors before the layers, or those after them."""
    C, gpt2 = c.hidden_size, c.family == "gpt2"
    before: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (c.vocab_size, C)}
    behind: dict[str, tuple[int, ...]] = {"norm.weight": (C,)}
    if gpt2:
        before["embed_positions.weight"] = (c.context_length, C)
        behind["norm.bias"] = (C,)
    if not c.tie_embeddings:
        behind["lm_head.weight"] = (c.vocab_size, C)
    for name, shape in (before if first else behind).items():
        yield published_name(name, c.family), shape


def _gpt2_layer(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Published shapes in one layer, (in, out); q_proj stands for the matrix that q, k and v share."""
    C, M = c.hidden_size, c.intermediate_size or 0
    shapes: dict[str, tuple[int, ...]] = {}
    for name, width in (("self_attn.q_proj", 3 * C), ("self_attn.o_proj", C), ("mlp.up_proj", M), ("mlp.down_proj", C)):
        shapes[f"{name}.weight"] = (M if name == "mlp.down_proj" else C, width)
        shapes[f"{name}.bias"] = (width,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes |= {f"{name}.weight": (C,), f"{name}.bias": (C,)}
    return shapes


def _qwen3_layer(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes in one layer, (out, in)."""
    C, M, D = c.hidden_size, c.intermediate_size or 0, c.head_size
    return {
        "input_layernorm.weight": (C,),
        "self_attn.q_proj.weight": (c.num_heads * D, C),
        "self_attn.k_proj.weight": (c.kv_heads * D, C),
        "self_attn.v_proj.weight": (c.kv_heads * D, C),
        "self_attn.o_proj.weight": (C, c.num_heads * D),
        "self_attn.q_norm.weight": (D,),
        "self_attn.k_norm.weight": (D,),
        "post_attention_layernorm.weight": (C,),
        "mlp.up_proj.weight": (M, C),
        "mlp.down_proj.weight": (C, M),
        "mlp.gate_proj.weight": (M, C),
    }


def published_name(name: str, family: str) -> str:
    """Hugging Face's name of our tensor; gpt2's q, k and v share one."""
    if name == "lm_head.weight":
        return name
    if family == "qwen3":
        return f"model.{name}"
    layer, part, kind = re.fullmatch(r"(layers\.\d+\.)?(.+)\.(weight|bias)", name).groups()  # type: ignore[union-attr]
    return f"transformer.{(layer or '').replace('layers', 'h')}{GPT2_PARTS[part]}.{kind}"


def _groups(model: GPT) -> dict[str, list[str]]:
    """Published name -> our tensors in it, in order."""
    groups: dict[str, list[str]] = {}
    for name in _shapes(model):
        groups.setdefault(published_name(name, model.config.family), []).append(name)
    return groups


def to_published(model: GPT, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our tensors in Hugging Face's names and layout, on the CPU, one at a time. Raises PackageError for another shape.

    Each is asked of `state` when it is due, so a state that reads them from files never has all in memory.
    """
    shapes = _shapes(model)
    for name in shapes:
        if name not in state:
            raise PackageError(f"the weights lack {name}.{did_you_mean(name, state)}")
    for published, names in _groups(model).items():
        parts = [state[name].detach().cpu() for name in names]
        for name, part in zip(names, parts, strict=True):
            if part.shape != shapes[name]:
                raise PackageError(f"{name} has shape {tuple(part.shape)}; the config says {tuple(shapes[name])}")
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        yield published, (whole.t() if _is_transposed(published) else whole).contiguous()


def from_published(model: GPT, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's tensors, which must match the config, in our names and shapes, contiguous."""
    groups = _groups(model)
    for published, tensor in tensors:
        whole, names = tensor.t() if _is_transposed(published) else tensor, groups[published]
        yield from zip(names, (part.contiguous() for part in whole.chunk(len(names))), strict=True)


def _is_transposed(published: str) -> bool:
    return bool(re.search(r"\.c_\w+\.weight$", published))


def published_config(c: ModelConfig) -> dict[str, Any]:
    """config.json as `transformers` writes it for this network."""
    named = {key: getattr(c, field) for field, key in KEYS[c.family].items()}
    if c.family == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            **named,
            "n_ctx": c.context_length,
            "embd_pdrop": c.dropout,
            "attn_pdrop": c.dropout,
            "activation_function": "gelu_new",
        }
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **named,
        "hidden_act": "silu",
        "attention_bias": False,
        # also in this form, which transformers 5 reads; older versions read rope_theta
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "use_sliding_window": False,
    }


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig that config.json describes. Raises PackageError for an unsupported network."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in UNDERSTOOD:
        raise PackageError(f"model_type {excerpt(family)} is not one of {', '.join(UNDERSTOOD)}")
    for key, values in UNDERSTOOD[family].items():
        if raw.get(key, values[0]) not in values:
            raise PackageError(f"{key} is {excerpt(raw[key])}; only {values[0]!r} is supported")
    keys, given = KEYS[family], DEFAULTS[family] | raw_fields(raw, family)
    try:
        return ModelConfig(family=family, **given)
    except ConfigError as error:  # with config.json's keys
        ours = re.compile(rf"\b({'|'.join(keys)})\b")
        raise PackageError(ours.sub(lambda found: keys[found[1]], str(error))) from error


def raw_fields(raw: dict[str, Any], family: str) -> dict[str, Any]:
    """ModelConfig's fields from config.json, unchecked, without missing optional ones."""
    fields = {field: raw[key] for field, key in KEYS[family].items() if key in raw}
    if family == "qwen3":
        _check_layer_types(raw.get("layer_types"))
        fields["rope_theta"] = _rope_theta(raw)
    for field, key in KEYS[family].items():
        default = DEFAULTS[family].get(field, ...)
        if field not in fields and default is ...:
            raise PackageError(f"the key {key!r} is missing")
        if fields.get(field, ...) is None and default is not None and (family, field) != ("qwen3", "head_dim"):
            raise PackageError(f"{key} is null; expected a value")
    return fields


def _rope_theta(raw: dict[str, Any]) -> Any:
    """The base wavelength, from wherever transformers reads it. Raises PackageError for any scaled variant."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key)
        if rope is not None and not isinstance(rope, dict):
            raise PackageError(f"{key} is {excerpt(rope)}; expected an object with rope_type, or null")
        if not rope:
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise PackageError(f"rope_type is {excerpt(kind)} in {key}; only 'default' is supported")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise PackageError(
                f"partial_rotary_factor is {excerpt(rope['partial_rotary_factor'])}; only 1.0 is supported"
            )
        nested = next((name for name, value in rope.items() if isinstance(value, dict)), None)
        if nested is not None:
            raise PackageError(f"{key} has {excerpt(nested)}, one setting per kind of layer; expected one for all")
    first = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    return first.get("rope_theta", raw.get("rope_theta", ROPE_THETA))


def _check_layer_types(kinds: Any) -> None:
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise PackageError(f"layer_types is {excerpt(kinds)}; only 'full_attention' is supported")
