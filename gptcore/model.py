"""The network, read top to bottom in one sitting: token ids in, logits (or a loss) out.

One decoder, two dialects. `gpt2` is numerically transformers' GPT2LMHeadModel. The others are one rotary decoder:
`qwen3`, `llama` and `mistral` without its QK-norm, `qwen2` with biases on q, k and v instead. Parameter names follow
Qwen3's, and `gptcore.package` maps them to each family's published tensor names.
Shapes: B sequences, T positions, C = hidden_size, H heads, K key/value heads, D = head_dim, V = vocab_size.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptcore.config import ModelConfig
from gptcore.loss import head_cross_entropy, softmax_loss
from gptcore.rotary import rotary_tables, rotate


class KVCache:
    """Keys and values of the tokens seen so far: two fixed buffers (L, B, K, S, D), filled from the left."""

    def __init__(
        self, config: ModelConfig, batch_size: int, length: int = 0, dtype=torch.float32, device="cpu"
    ) -> None:
        slots = length or config.context_length
        shape = (config.num_layers, batch_size, config.kv_heads, slots, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, K, T, D) to those of `layer`; return all of them, (B, K, length + T, D)."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich 2019) whose gain follows the input's dtype, which the fused kernel needs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config: ModelConfig, size: int) -> nn.Module:
    norm = RMSNorm if config.rotary else nn.LayerNorm
    return norm(size, eps=config.norm_eps or 0.0)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = True, dropout: float = 0.0):
    """softmax(q k^T / sqrt(D)) v for q (B, H, T, D) and k, v (B, K, S, D).

    `mask`, (T, S) or (B, 1, T, S), is true where allowed.
    torch's fused kernel, except for short bf16 sequences on a CPU, where plain matrix products take half its time.
    """
    B, H, T, D = q.shape
    if mask is not None and q.device.type == "cuda" and k.size(1) != H:  # no fused kernel has both a mask and groups
        k, v = (heads.repeat_interleave(H // heads.size(1), dim=1) for heads in (k, v))
    plain = q.device.type == "cpu" and q.dtype == torch.bfloat16 and causal and T <= 512 and k.size(1) == H
    if not plain or dropout or T == 1:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and T > 1, dropout_p=dropout, enable_gqa=k.size(1) != H
        )
    bias = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(bias, q.reshape(-1, T, D), k.reshape(-1, T, D).mT, alpha=D**-0.5)  # (B*H, T, T)
    return torch.bmm(scores.softmax(-1), v.reshape(-1, T, D)).view(B, H, T, D)


def own_text(positions: Tensor) -> Tensor:
    """The mask (B, 1, T, T) by which each token of rows of texts, (B, T) positions from 0, sees its own text so far."""
    text = (positions == 0).cumsum(1)  # (B, T)
    return (text[:, :, None] == text[:, None, :]).tril().unsqueeze(1)


class Attention(nn.Module):
    """Causal self-attention; with RoPE and grouped key/value heads in the rotary families, with QK-norm in qwen3."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        C, D = config.hidden_size, config.head_size
        self.q_proj = nn.Linear(C, config.num_heads * D, bias=config.qkv_biases)
        self.k_proj = nn.Linear(C, config.kv_heads * D, bias=config.qkv_biases)
        self.v_proj = nn.Linear(C, config.kv_heads * D, bias=config.qkv_biases)
        self.o_proj = nn.Linear(config.num_heads * D, C, bias=not config.rotary)
        if config.qk_norm:
            self.q_norm, self.k_norm = make_norm(config, D), make_norm(config, D)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: KVCache | None, mask: Tensor | None = None
    ) -> Tensor:
        B, T, _ = x.shape
        D = self.config.head_size
        q = self.q_proj(x).view(B, T, -1, D)  # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, D)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, D).transpose(1, 2)  # (B, K, T, D)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, H, T, D), (B, K, T, D)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            past = cache.length
            k, v = cache.update(self.layer, k, v)
            if past and T > 1:  # a chunk behind earlier tokens: causal within the chunk, open to the past
                mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        dropout = self.config.dropout if self.training else 0.0
        y = attend(q, k, v, mask, causal=mask is None, dropout=dropout)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class MLP(nn.Module):
    """The position-wise network: SwiGLU (Shazeer 2020), or GELU (its tanh form) in gpt2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, M = config.hidden_size, config.intermediate_size or 0
        self.gated = config.rotary
        self.up_proj = nn.Linear(C, M, bias=not self.gated)
        self.down_proj = nn.Linear(M, C, bias=not self.gated)
        if self.gated:
            self.gate_proj = nn.Linear(C, M, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)  # (B, T, M)
        hidden = F.silu(self.gate_proj(x)) * up if self.gated else F.gelu(up, approximate="tanh")
        return self.down_proj(hidden)  # (B, T, C)


class Block(nn.Module):
    """Pre-norm residual block: attention, then the MLP."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: KVCache | None, mask: Tensor | None = None
    ) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotary, cache, mask))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class GPT(nn.Module):
    """A decoder-only transformer. `GPT(config)` is initialised and ready to train."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.softmax_loss = softmax_loss
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if not config.rotary:
            self.embed_positions = nn.Embedding(config.context_length, config.hidden_size)
        else:
            for name, table in zip(("cos", "sin"), rotary_tables(config), strict=True):
                self.register_buffer(name, table, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        if not self.lm_head.weight.is_meta:  # initialising meta tensors imports torch's compiler, which takes seconds
            self.init_weights()
        if not config.qkv_bias:  # frozen at zero, so that the published layout, which has them, still holds
            for name, p in self.named_parameters():
                if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
                    p.requires_grad_(False)

    def init_weights(self) -> None:
        """Initialise every parameter from torch's global generator."""
        for name, p in self.named_parameters():
            self.init_weight(name, p)

    @torch.no_grad()
    def init_weight(self, name: str, p: Tensor) -> Tensor:
        """Initialise `p`, which has the shape of the parameter `name`, and return it.

        | parameter                   | gpt2 (Radford et al. 2019)   | rotary                        |
        |-----------------------------|------------------------------|-------------------------------|
        | embeddings                  | N(0, 0.02)                   | N(0, 1), tied: N(0, 0.02)     |
        | q, k, v, gate, up           | N(0, 0.02)                   | U(-s, s), std 1/sqrt(C)       |
        | o, down (onto the residual) | N(0, 0.02 / sqrt(2 layers))  | 0: every block starts as x    |
        | lm_head, untied             | N(0, 0.02)                   | 0: the first loss is ln V     |
        | norms, biases               | gain 1, bias 0               | gain 1, bias 0                |
        """
        gpt2, C = not self.config.rotary, self.config.hidden_size
        residual = 0.02 / math.sqrt(2 * self.config.num_layers) if gpt2 else 0.0
        if name.startswith("embed"):
            return p.normal_(std=1.0 if not gpt2 and not self.config.tie_embeddings else 0.02)
        if "norm" in name or name.endswith("bias"):
            return p.fill_(float(name.endswith("weight")))
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return p.normal_(std=residual) if residual else p.zero_()
        if gpt2:
            return p.normal_(std=0.02)
        if name == "lm_head.weight":
            return p.zero_()
        s = math.sqrt(3 / C)
        return p.uniform_(-s, s)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V) for tokens (B, T); with targets (B, T), the summed cross-entropy in nats instead.

        With a cache, `tokens` continue its sequences; the caller must keep cached and new tokens within
        `context_length`. Targets equal to IGNORE do not count. With `positions` (B, T), a row holds several texts:
        each begins at position 0 and does not see the others.
        """
        past = cache.length if cache is not None else 0
        at: Any = slice(past, past + tokens.size(1)) if positions is None else positions
        x = self.embed_tokens(tokens)  # (B, T, C)
        rotary, mask = None, None if positions is None else own_text(positions)
        if not self.config.rotary:
            x = x + self.embed_positions.weight[at]
        else:
            rotary = (self.cos[at].unsqueeze(-3), self.sin[at].unsqueeze(-3))  # (1, T, D), or (B, 1, T, D)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, rotary, cache, mask)
        if cache is not None:
            cache.length += tokens.size(1)
        x = self.norm(x)
        if targets is None:
            return self.lm_head(x)  # (B, T, V)
        return head_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.softmax_loss)

    def num_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of one training step per token, forward and backward, in sequences of `length`.

        Six per matrix parameter (the head counts, the input embedding does not), four per frozen one, plus attention's
        12 L H D T (PaLM, Chowdhery et al. 2022, appendix B).
        """
        c = self.config
        matrices: list[Tensor] = [p for n, p in self.named_parameters() if p.ndim == 2 and not n.startswith("embed")]
        matrices += [self.embed_tokens.weight] if c.tie_embeddings else []
        return (
            sum((6 if p.requires_grad else 4) * p.numel() for p in matrices)
            + 12 * c.num_layers * c.num_heads * c.head_size * length
        )


def initial_weights(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter of `GPT(config)`, tied ones once; the whole model never exists."""
    with torch.device("meta"), _Drawing():
        model = GPT(config)
    for name, p in model.named_parameters():
        yield name, model.init_weight(name, torch.empty(p.shape))


class _Drawing(TorchFunctionMode):
    """Draws what torch.nn.init draws for each tensor, though it is on the meta device, and discards it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) != "torch.nn.init":
            return func(*args, **kwargs)
        tensor = args[0] if args else kwargs.pop("tensor")
        func(torch.empty(tensor.shape, device="cpu"), *args[1:], **kwargs)
        return tensor
