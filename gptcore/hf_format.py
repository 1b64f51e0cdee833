"""Converts between our names and Hugging Face's: the keys of config.json, and the names and layout of tensors.

Both directions, without files: `ModelConfig` <-> config.json's dict, GPT's state <-> published tensors.
`gptcore.package` writes and reads the files.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptcore.config import ModelConfig
from gptcore.errors import ConfigError, PackageError, did_you_mean, excerpt
from gptcore.model import GPT
from gptcore.quantised import BITS, Quantised
from gptcore.rope_format import published_rope, rope_fields

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

_ROTARY_UNDERSTOOD: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1.0, None),
}
UNDERSTOOD: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "qwen3": {**_ROTARY_UNDERSTOOD, "attention_bias": (False,), "use_sliding_window": (False,)},
    "qwen2": {**_ROTARY_UNDERSTOOD, "use_sliding_window": (False,)},
    "llama": {**_ROTARY_UNDERSTOOD, "attention_bias": (False,), "mlp_bias": (False,)},
    "mistral": _ROTARY_UNDERSTOOD,
}
"""Settings of config.json that change the network, and their supported values, the default first."""

_ROTARY_KEYS = {
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
}
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
    **dict.fromkeys(("qwen3", "qwen2", "llama", "mistral"), _ROTARY_KEYS),
}
"""ModelConfig's fields -> config.json's keys."""

_ROTARY_DEFAULTS: dict[str, Any] = {
    "num_kv_heads": None,
    "head_dim": None,
    "dropout": 0.0,
    "norm_eps": 1e-6,
    "tie_embeddings": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"intermediate_size": None, "dropout": 0.1, "norm_eps": 1e-5, "tie_embeddings": True, "qkv_bias": True},
    "qwen3": {**_ROTARY_DEFAULTS, "head_dim": 128},
    "qwen2": _ROTARY_DEFAULTS,
    "llama": _ROTARY_DEFAULTS,
    "mistral": _ROTARY_DEFAULTS,
}
"""transformers' defaults for keys missing in config.json; all other keys are required."""
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
"""transformers' class for each rotary family."""
Value = TypeVar("Value", Tensor, Tensor | Quantised)
WINDOW = 4096
"""Mistral's sliding window, if config.json does not say another."""


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
    layer = _rotary_layer(config) if config.rotary else _gpt2_layer(config)
    for number in range(config.num_layers):
        for name, shape in layer.items():
            yield published_name(f"layers.{number}.{name}", config.family), shape
    yield from _around_layers(config, first=False)


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, tied ones once, without building the network."""
    return sum(prod(shape) for _, shape in tensor_shapes(config))


def _around_layers(c: ModelConfig, first: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors before the layers, or those after them."""
    C, gpt2 = c.hidden_size, not c.rotary
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


def _rotary_layer(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes in one layer, (out, in)."""
    C, M, D = c.hidden_size, c.intermediate_size or 0, c.head_size
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (C,)}
    for name, heads in (("q_proj", c.num_heads), ("k_proj", c.kv_heads), ("v_proj", c.kv_heads)):
        shapes[f"self_attn.{name}.weight"] = (heads * D, C)
        if c.qkv_biases:
            shapes[f"self_attn.{name}.bias"] = (heads * D,)
    shapes["self_attn.o_proj.weight"] = (C, c.num_heads * D)
    if c.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (D,), "self_attn.k_norm.weight": (D,)}
    return shapes | {
        "post_attention_layernorm.weight": (C,),
        "mlp.up_proj.weight": (M, C),
        "mlp.down_proj.weight": (C, M),
        "mlp.gate_proj.weight": (M, C),
    }


def published_name(name: str, family: str) -> str:
    """Hugging Face's name of our tensor; gpt2's q, k and v share one."""
    if name == "lm_head.weight":
        return name
    if family != "gpt2":
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
        yield published, (whole.t() if is_transposed(published) else whole).contiguous()


def from_published(model: GPT, tensors: Iterable[tuple[str, Value]]) -> Iterator[tuple[str, Value]]:
    """Hugging Face's tensors, which must match the config, in our names and shapes, contiguous."""
    groups = _groups(model)
    for published, tensor in tensors:
        names = groups[published]
        if isinstance(tensor, Tensor):
            whole = tensor.t() if is_transposed(published) else tensor
            yield from zip(names, (part.contiguous() for part in whole.chunk(len(names))), strict=True)
        else:
            yield from zip(names, tensor.chunk(len(names)), strict=True)


def quantised_bits(config: ModelConfig, published: str, shape: tuple[int, ...], scheme: str) -> int:
    """The bits of a published tensor in a scheme, 0 if it is not quantised: matrices are, but not what is looked up."""
    layers, head = BITS.get(scheme, (0, 0))
    if len(shape) != 2 or published == published_name("embed_positions.weight", "gpt2"):
        return 0
    if published == published_name("embed_tokens.weight", config.family):
        return head if config.tie_embeddings else 0
    return head if published == published_name("lm_head.weight", config.family) else layers


def is_transposed(published: str) -> bool:
    """Whether the published matrix is the transpose of ours."""
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
    rope = published_rope(c)
    return {
        "architectures": [ARCHITECTURES[c.family]],
        "model_type": c.family,
        **named,
        **{key: values[0] for key, values in UNDERSTOOD[c.family].items() if key != "partial_rotary_factor"},
        **({"sliding_window": None} if c.family == "mistral" else {}),
        "rope_parameters": rope,  # transformers 5 reads this; older versions read rope_theta and rope_scaling
        **({"rope_scaling": rope} if c.rope_scaling is not None else {}),
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
    if family != "gpt2":
        _check_layer_types(raw.get("layer_types"))
        fields |= rope_fields(raw, fields.get("context_length"))
    if family == "mistral":
        _check_window(raw, fields.get("context_length"))
    for field, key in KEYS[family].items():
        default = DEFAULTS[family].get(field, ...)
        if field not in fields and default is ...:
            raise PackageError(f"the key {key!r} is missing")
        if fields.get(field, ...) is None and default is not None and field != "head_dim":
            raise PackageError(f"{key} is null; expected a value")
    return fields


def _check_window(raw: dict[str, Any], context_length: Any) -> None:
    """Raises PackageError if Mistral's attention has a sliding window that is shorter than the context."""
    window = raw.get("sliding_window", WINDOW)
    if window is None or (isinstance(window, int) and isinstance(context_length, int) and window >= context_length):
        return
    given = f"is {excerpt(window)}" if "sliding_window" in raw else f"is missing, so {WINDOW}"
    least = f"max_position_embeddings ({excerpt(context_length)}) or more"
    raise PackageError(f"sliding_window {given}; only null is supported, or {least}")


def _check_layer_types(kinds: Any) -> None:
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise PackageError(f"layer_types is {excerpt(kinds)}; only 'full_attention' is supported")
