"""The shape of a model, and named presets.

Network, package and trainer share `ModelConfig`. `MODEL_PRESETS` names common shapes. How a model is trained is
configured in `train_job.config`.
"""

import numbers
from dataclasses import dataclass, field, fields
from typing import Any

from gptcore.errors import ConfigError, did_you_mean, excerpt

FAMILIES = ("qwen3", "gpt2", "qwen2", "llama", "mistral")
"""Names as in Hugging Face's `model_type`. All but gpt2 are the same rotary decoder, with different switches."""
ROPE_KINDS = ("linear", "llama3", "yarn")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices that can have adapters; gpt2 has no gate_proj."""
ALL_LINEAR = "all-linear"
"""PEFT's name for all of them."""

WHOLE = {
    "vocab_size": 2**20,
    "context_length": 2**24,
    "hidden_size": 2**16,
    "num_layers": 2**10,
    "num_heads": 2**10,
    "num_kv_heads": 2**10,
    "head_dim": 2**12,
    "intermediate_size": 2**18,
    "original_context": 2**24,
}
"""Integer fields and their upper limits, several times larger than in any published model."""
REAL = {
    "rope_theta": (1.0, 1e12),
    "norm_eps": (1e-12, 1.0),
    "dropout": (0.0, 0.999),
    **dict.fromkeys(("factor", "attention_factor", "low_freq_factor", "high_freq_factor"), (1e-3, 1e6)),
    **dict.fromkeys(("beta_fast", "beta_slow"), (1e-3, 1e6)),
}
"""Float fields with their bounds."""
SWITCHES = ("qkv_bias", "tie_embeddings", "truncate")


def setting(default: Any, help: str, unit: str = "", choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with its documentation, from which `--help`, YAML comments and the docs are made."""
    return field(default=default, metadata={"help": help, "unit": unit, "choices": choices})


@dataclass(frozen=True)
class RopeScaling:
    """How a model's rotary embedding is stretched beyond the context that it was first trained with.

    `gptcore.rotary` computes it. Raises ConfigError for a value out of range.
    """

    kind: str
    """One of ROPE_KINDS."""
    factor: float
    """How many times the context is longer."""
    original_context: int
    """Tokens."""
    attention_factor: float = 1.0
    """Of queries and keys alike (yarn)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """Turns in the original context below which a wave is stretched, and above which it is not (llama3)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """The same the other way round (yarn)."""
    truncate: bool = True
    """Whether to round the dimensions at which stretching begins and ends (yarn)."""

    def __post_init__(self) -> None:
        for f in fields(self):
            _check(f.name, getattr(self, f.name))
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"low_freq_factor is {self.low_freq_factor}; expected less than high_freq_factor, "
                f"{self.high_freq_factor}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one network. Fields left at None are derived from the others.

    Raises ConfigError if the values are inconsistent.
    """

    vocab_size: int = field(metadata={"help": "Rows of the embedding; set from the tokenizer.", "unit": "tokens"})
    family: str = setting(
        "qwen3",
        "Architecture: qwen3 (RMSNorm, RoPE, QK-norm, SwiGLU), the same without QK-norm (llama, mistral, and qwen2 "
        "with biases on q, k, v), or gpt2 (LayerNorm, learned positions, GELU).",
        choices=FAMILIES,
    )
    context_length: int = setting(256, "Longest sequence the model sees.", "tokens")
    hidden_size: int = setting(256, "Width of the residual stream.", "features")
    num_layers: int = setting(4, "Transformer blocks.", "blocks")
    num_heads: int = setting(4, "Attention heads.", "heads")
    num_kv_heads: int | None = setting(None, "Key/value heads (grouped-query attention); default num_heads.", "heads")
    head_dim: int | None = setting(None, "Width of one head; default hidden_size / num_heads.", "features")
    intermediate_size: int | None = setting(
        None, "Width inside the MLP; default 4x hidden (gpt2) or 8/3x rounded up to 64.", "features"
    )
    dropout: float = setting(0.0, "Dropout on embeddings, attention and residual branches while training.")
    qkv_bias: bool = setting(True, "Biases on the query, key and value projections (gpt2 only).")
    tie_embeddings: bool | None = setting(
        None, "Use the embedding as the output head; default true for gpt2, else false."
    )
    rope_theta: float = setting(10000.0, "Base wavelength of the rotary embedding (not gpt2).")
    norm_eps: float | None = setting(None, "Epsilon inside the norms; default 1e-5 (gpt2) or 1e-6.")
    rope_scaling: RopeScaling | None = None
    """Comes with an opened model; it cannot be set."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ConfigError(
                f"family {self.family!r} is not one of {', '.join(FAMILIES)}.{did_you_mean(self.family, FAMILIES)}"
            )
        for f in fields(self):
            if f.default is not None or getattr(self, f.name) is not None:  # else it is derived below, or there is none
                _check(f.name, getattr(self, f.name))
        gpt2 = not self.rotary
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}; "
                f"{self.hidden_size // self.num_heads * self.num_heads or self.num_heads} would be"
            )
        mlp = 4 * self.hidden_size if gpt2 else -(-self.hidden_size * 8 // 3 // 64) * 64
        self._derive("head_dim", self.hidden_size // self.num_heads)
        self._derive("num_kv_heads", self.num_heads)
        self._derive("intermediate_size", mlp)
        self._derive("tie_embeddings", gpt2)
        self._derive("norm_eps", 1e-5 if gpt2 else 1e-6)
        if self.num_heads % self.kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}")
        if gpt2 and (self.kv_heads != self.num_heads or self.head_size * self.num_heads != self.hidden_size):
            raise ConfigError(
                "the gpt2 family has as many key/value heads as heads, and head_dim x heads = hidden_size"
            )
        if not gpt2 and self.head_size % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary embeddings need an even head_dim")

    def _derive(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    @property
    def rotary(self) -> bool:
        """Whether it is the rotary decoder: RMSNorm, RoPE and SwiGLU."""
        return self.family != "gpt2"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return self.family == "qwen3"

    @property
    def qkv_biases(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.family in ("gpt2", "qwen2")

    # The optional fields are never None after __post_init__; these tell the type checker.
    @property
    def head_size(self) -> int:
        """Width of one attention head, in features."""
        return self.head_dim or 0

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_kv_heads or 0


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (LoRA, Hu et al. 2021): beside a frozen matrix W (out, in) train A (r, in) and B (out, r).

    The network computes with W + alpha / r B A. Raises ConfigError for an unknown target.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    """Of the adapters' input, while training."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Some of LORA_TARGETS, or ALL_LINEAR."""

    def __post_init__(self) -> None:
        known = (ALL_LINEAR, *LORA_TARGETS)
        if not self.targets:
            raise ConfigError(f"lora_targets is empty; expected {', '.join(known)}")
        for target in self.targets:
            if target not in known:
                raise ConfigError(
                    f"lora_targets has {excerpt(target)}; expected {', '.join(known)}.{did_you_mean(target, known)}"
                )

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank


def _check(name: str, value: Any) -> None:
    """Raises ConfigError unless `value` has the type of the setting `name` and is within its bounds."""
    number = not isinstance(value, bool)
    if name in WHOLE:
        fits = number and isinstance(value, numbers.Integral) and 1 <= int(value) <= WHOLE[name]
        expected = f"a whole number from 1 to {WHOLE[name]}"
    elif name in REAL:
        least, most = REAL[name]
        fits = number and isinstance(value, numbers.Real) and bool(least <= value <= most)  # type: ignore[operator]
        expected = f"a number from {least:g} to {most:g}"
    else:
        fits, expected = name not in SWITCHES or isinstance(value, bool), "true or false"
    if not fits:
        raise ConfigError(f"{name} is {excerpt(value)}; expected {expected}", param=name)


MODEL_PRESETS: dict[str, dict[str, Any]] = {
    # The demo: learns tiny corpora on a laptop's CPU in about two minutes.
    "quick": dict(family="qwen3", num_layers=4, num_heads=2, hidden_size=256, context_length=256),
    # The chat demo: short wavelengths, since its tasks are to copy and rearrange what stands close by.
    "chat": dict(
        family="qwen3",
        num_layers=4,
        num_heads=2,
        hidden_size=96,
        intermediate_size=128,
        context_length=256,
        rope_theta=500.0,
    ),
    # GPT-2 small as OpenAI published it, and the qwen3 family at the same size.
    "gpt2-124m": dict(family="gpt2", num_layers=12, num_heads=12, hidden_size=768, context_length=1024),
    "foundry-124m": dict(
        family="qwen3", num_layers=12, num_heads=12, hidden_size=768, context_length=1024, tie_embeddings=True
    ),
    # The models of this project's predecessors.
    "tiny": dict(family="gpt2", num_layers=2, num_heads=4, hidden_size=128, context_length=128),
    "shakespeare": dict(family="gpt2", num_layers=12, num_heads=12, hidden_size=768, context_length=1024),
    "story": dict(
        family="gpt2",
        num_layers=12,
        num_heads=12,
        hidden_size=768,
        context_length=256,
        dropout=0.1,
        qkv_bias=False,
    ),
    "mini": dict(family="gpt2", num_layers=8, num_heads=4, hidden_size=768, context_length=512),
}


def model_preset(name: str, vocab_size: int) -> ModelConfig:
    """The named shape with `vocab_size` rows of embedding. Raises ConfigError for an unknown name."""
    if name not in MODEL_PRESETS:
        raise ConfigError(
            f"no preset is called {name!r}; there are {', '.join(MODEL_PRESETS)}.{did_you_mean(name, MODEL_PRESETS)}"
        )
    return ModelConfig(vocab_size=vocab_size, **MODEL_PRESETS[name])


MODEL_FIELDS = tuple(f for f in fields(ModelConfig) if f.name not in ("vocab_size", "rope_scaling"))
"""The fields that users set; the vocabulary size follows from the tokenizer."""
