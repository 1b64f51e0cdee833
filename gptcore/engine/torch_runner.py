"""A Runner on torch, for any device; keeps the keys and values of every slot.

Shapes: N slots, T tokens of each, C = hidden_size, H heads, K key/value heads of G = H / K heads each, D = head_dim,
S = context_length, W positions that attention looks at, V = vocab_size.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptcore.config import ModelConfig
from gptcore.engine.interface import Chunk
from gptcore.model import GPT, Block
from gptcore.rotary import rotate
from gptcore.sampling import SamplingState, next_tokens

NARROWEST = 128
"""Attention covers the first 128 positions, or 256 and so on: few shapes and graphs, and at most half is wasted."""


def _last(chunk: Chunk) -> Chunk:
    return replace(chunk, start=chunk.start + len(chunk.tokens) - 1, tokens=chunk.tokens[-1:], wanted=1)


class TorchRunner:
    """Runs `model`, a GPT in eval mode, with its device and dtype; fuses and packs its weights.

    Shapes are static. A decode step always runs all N rows; rows without a token write to an unused position. A prompt
    is processed in windows of `prefill` positions, with each token at the row of its position in the window. So a
    token's logits depend neither on other sequences nor on how its prompt was split at multiples of `prefill`. Decoding
    and prefill have different shapes and round differently.
    """

    invariant = False
    weights = ""

    def __init__(self, model: GPT, slots: int, prefill: int, compile: bool = False, note: str = "") -> None:
        config = model.config
        self.slots, self.context_length, self.vocab_size = slots, config.context_length, config.vocab_size
        self.reuse_granularity, self.note = min(prefill, config.context_length), note
        self.dtype, self.device = model.embed_tokens.weight.dtype, model.embed_tokens.weight.device
        packed = self.device.type == "cpu" and torch.backends.mkldnn.is_available() and not compile
        with torch.no_grad():
            self._net = _Network(model, packed)
        # One extra position, where rows without a token write.
        shape = (config.num_layers, slots, config.kv_heads, config.context_length + 1, config.head_size)
        self._keys, self._values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        self.cache_bytes = self._keys.nbytes + self._values.nbytes
        self._decode_step = torch.compile(self._step, dynamic=False) if compile else self._step
        self._inputs = torch.zeros(3, slots, 1, dtype=torch.long, device=self.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        cuda = self.device.type == "cuda"
        self.name = "torch" + ", compiled" * compile + ", CUDA graphs" * cuda
        if cuda:
            self._capture()

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """See Runner."""
        prefills = {chunk.slot: self._before_decode(chunk) for chunk in chunks}
        written = {slot: self._prefill(chunk) for slot, chunk in prefills.items() if chunk.tokens}
        decodes = [_last(chunk) for chunk in chunks if len(prefills[chunk.slot].tokens) < len(chunk.tokens)]
        decoded = self._decode(decodes) if decodes else None  # (N, V)
        slots = [chunk.slot for chunk in decodes]
        if decoded is not None and slots == list(range(self.slots)) and not written:
            return decoded
        logits = [torch.empty(0, self.vocab_size, device=self.device)]
        for chunk in chunks:
            logits += written.get(chunk.slot, [])
            if decoded is not None and chunk.slot in slots:
                logits.append(decoded[chunk.slot, None])
        return torch.cat(logits)

    def next_tokens(self, logits: Tensor, rows: Sequence[SamplingState]) -> list[int]:
        """See Runner."""
        return next_tokens(logits, rows)

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """See Runner."""
        for cache in (self._keys, self._values):
            cache[:, target, :, :length] = cache[:, source, :, :length]

    def close(self) -> None:
        """See Runner."""
        del self._decode_step, self._graphs, self._net, self._keys, self._values

    def _before_decode(self, chunk: Chunk) -> Chunk:
        """The part of `chunk` for prefill. A last token alone in its window is decoded, however the chunk was split."""
        alone = chunk.wanted > 0 and (
            len(chunk.tokens) == 1 or (chunk.start + len(chunk.tokens) - 1) % self.reuse_granularity == 0
        )
        return replace(chunk, tokens=chunk.tokens[:-1], wanted=chunk.wanted - 1) if alone else chunk

    def _decode(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits (N, V) of one token per chunk, at the row of its slot; other rows are undefined."""
        tokens, positions, write = [0] * self.slots, [0] * self.slots, [self.context_length] * self.slots
        for chunk in chunks:
            tokens[chunk.slot] = chunk.tokens[0]
            positions[chunk.slot] = write[chunk.slot] = chunk.start
        self._inputs.copy_(torch.tensor([tokens, positions, write])[:, :, None])
        width = self._width(1 + max(positions))
        if width in self._graphs:
            graph, logits = self._graphs[width]
            graph.replay()
            return logits
        return self._decode_step(width)

    def _step(self, width: int) -> Tensor:
        x = self._net.hidden(self._inputs, self._keys, self._values, width)  # (N, 1, C)
        return self._net.logits(x[:, 0])  # (N, V)

    def _prefill(self, chunk: Chunk) -> list[Tensor]:
        """Run a chunk window by window; return logits (., V) of its last `wanted` tokens, in pieces."""
        S, P, slots = self.context_length, self.reuse_granularity, slice(chunk.slot, chunk.slot + 1)
        end = chunk.start + len(chunk.tokens)
        logits = []
        for base in range(chunk.start // P * P, end, P):
            begin, stop = max(base, chunk.start), min(base + P, end)
            before, after = [0] * (begin - base), [0] * (base + P - stop)
            tokens = [*before, *chunk.tokens[begin - chunk.start : stop - chunk.start], *after]
            positions = [min(position, S - 1) for position in range(base, base + P)]
            write = [position if begin <= position < stop else S for position in range(base, base + P)]
            inputs = torch.tensor([[tokens], [positions], [write]], device=self.device)  # (3, 1, P)
            width = self._width(min(base + P, S))
            x = self._net.hidden(inputs, self._keys[:, slots], self._values[:, slots], width)  # (1, P, C)
            for rows in x[0, max(begin, end - chunk.wanted) - base : stop - base].split(self.slots):
                # Always as many rows as in a decode step, so that logits do not depend on their number.
                padded = F.pad(rows, (0, 0, 0, self.slots - len(rows)))
                logits.append(self._net.logits(padded)[: len(rows)])
        return logits

    def _width(self, length: int) -> int:
        """The number of positions that attention covers to include the first `length`."""
        width = NARROWEST
        while width < length:
            width *= 2
        return min(width, self.context_length)

    def _capture(self) -> None:
        """Record a decode step of each width as a CUDA graph, which replays without a launch per kernel."""
        pool = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream(self.device)
        with torch.cuda.device(self.device), torch.inference_mode():
            for width in sorted({self._width(length) for length in range(1, self.context_length + 1)}):
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(
                    side
                ):  # the first run allocates and compiles, which is not allowed during capture
                    self._decode_step(width)
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    logits = self._decode_step(width)
                self._graphs[width] = graph, logits


class _Network:
    """A GPT with fused weights that takes tokens at any positions."""

    def __init__(self, model: GPT, packed: bool) -> None:
        config = model.config
        self.groups = config.num_heads // config.kv_heads
        self.tokens = model.embed_tokens.weight
        self.positions = None if config.rotary else model.embed_positions.weight
        self.rotary = (model.cos, model.sin) if config.rotary else None
        self.layers = [_Layer(block, config, packed) for block in model.layers if isinstance(block, Block)]
        self.norm = model.norm
        self.head = _linear([model.lm_head], packed)

    def hidden(self, inputs: Tensor, keys: Tensor, values: Tensor, width: int) -> Tensor:
        """The residual stream (N, T, C) after the last layer; writes into keys and values (L, N, K, S+1, D).

        `inputs` (3, N, T) are token ids, their positions, and their positions in the cache. A token attends to the
        first `width` cache positions, up to its own.
        """
        tokens, positions, write = inputs
        N, T = tokens.shape
        x = F.embedding(tokens, self.tokens)  # (N, T, C)
        rotary = None
        if self.positions is not None:
            x = x + F.embedding(positions, self.positions)
        elif self.rotary is not None:
            cos, sin = (table[positions][:, :, None] for table in self.rotary)  # (N, T, 1, D)
            rotary = cos, sin
        later = torch.arange(width, device=x.device) > positions[:, None, None, :, None]  # (N, 1, 1, T, W)
        bias = torch.zeros(later.shape, dtype=x.dtype, device=x.device).masked_fill_(later, float("-inf"))
        bias = bias.expand(N, 1, self.groups, T, width).reshape(N, 1, -1, width)  # (N, 1, G T, W)
        place = torch.arange(N, device=x.device)[:, None], write
        for layer, k_cache, v_cache in zip(self.layers, keys, values, strict=True):
            x = layer(x, rotary, bias, place, k_cache, v_cache)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Logits (N, V) in fp32 for x (N, C)."""
        return self.head(self.norm(x)).float()


class _Layer:
    """One block of a GPT with fused and packed weights, and attention over a cache."""

    def __init__(self, block: Block, config: ModelConfig, packed: bool) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.heads, self.kv_heads, self.gated = config.num_heads, config.kv_heads, mlp.gated
        self.norm1, self.norm2 = block.input_layernorm, block.post_attention_layernorm
        self.qk_norms = (attention.q_norm, attention.k_norm) if config.qk_norm else None
        self.qkv = _linear([attention.q_proj, attention.k_proj, attention.v_proj], packed)
        self.out = _linear([attention.o_proj], packed)
        self.up = _linear([mlp.gate_proj, mlp.up_proj] if mlp.gated else [mlp.up_proj], packed)
        self.down = _linear([mlp.down_proj], packed)

    def __call__(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        bias: Tensor,
        place: tuple[Tensor, Tensor],
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:
        N, T, _ = x.shape
        H, K, W, D = self.heads, self.kv_heads, bias.size(-1), k_cache.size(-1)
        q, k, v = self.qkv(self.norm1(x)).view(N, T, -1, D).split((H, K, K), dim=2)  # (N, T, H or K, D)
        if self.qk_norms is not None:
            q, k = (norm(heads) for norm, heads in zip(self.qk_norms, (q, k), strict=True))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        rows, write = place
        k_cache[rows, :, write] = k
        v_cache[rows, :, write] = v
        # Heads that share keys and values become additional queries: (N, K, G T, D).
        q = q.reshape(N, T, K, -1, D).permute(0, 2, 3, 1, 4).reshape(N, K, -1, D)
        y = F.scaled_dot_product_attention(q, k_cache[:, :, :W], v_cache[:, :, :W], attn_mask=bias)
        y = y.view(N, K, -1, T, D).permute(0, 3, 1, 2, 4).reshape(N, T, H * D)
        x = x + self.out(y)
        hidden = self.up(self.norm2(x))
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            return x + self.down(F.silu(gate) * up)
        return x + self.down(F.gelu(hidden, approximate="tanh"))


def _linear(parts: Sequence[nn.Module], packed: bool) -> Callable[[Tensor], Tensor]:
    """Linear layers with the same input, fused, and `packed_linear` if `packed`."""
    weights, biases = zip(*((part.weight, part.bias) for part in parts), strict=True)
    weight: Tensor = torch.cat(weights) if len(parts) > 1 else weights[0].detach()
    bias = None if biases[0] is None else torch.cat(biases)
    return packed_linear(weight, bias) if packed else partial(F.linear, weight=weight, bias=bias)


def packed_linear(weight: Tensor, bias: Tensor | None = None, rows: int | None = None) -> Callable[[Tensor], Tensor]:
    """A linear layer for a CPU with its weight reordered for oneDNN, which is faster; best for `rows` rows of input.

    On a CPU whose instructions oneDNN's bf16 cannot use, such as one with AVX2 alone, a bf16 weight stays as it is.
    Uses private operators of torch, tried with 2.13; tests/gptcore/engine/test_runner.py fails when they change.
    """
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return partial(F.linear, weight=weight, bias=bias)
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, ordered, bias, "none", [], "")
