"""GPT-2 124M trained in the shape of nanoGPT's loop, as a peer of ours on a GPU.

From its README and its published configuration: one fused projection for q, k and v, LayerNorm and GELU, no biases,
torch's fused attention, a tied head over 50,304 rows, bf16 autocast, the whole model compiled, gradients clipped at 1,
and fused AdamW. Written here; nothing of nanoGPT is installed.
"""

import time
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Block(nn.Module):
    """Attention and MLP of width C, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Network(nn.Module):
    """The decoder; returns the mean cross-entropy in nats."""

    def __init__(self, vocab_size: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.size(1)]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def measure(micro: int, accumulate: int, steps: int, device: torch.device, small: bool = False) -> dict[str, Any]:
    """Tokens/s over the last two thirds of the steps; `small` runs a tiny network that is not compiled."""
    size: dict[str, int] = dict(vocab_size=50304, length=1024, width=768, layers=12, heads=12)
    if small:
        size |= dict(length=64, width=64, layers=2, heads=2)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    network = Network(**size).to(device)
    run: Any = network if small else torch.compile(network)
    weights = [p for p in network.parameters() if p.ndim == 2]
    gains = [p for p in network.parameters() if p.ndim < 2]
    groups = [dict(params=weights, weight_decay=0.1), dict(params=gains, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    stream = torch.randint(0, 50257, (micro * accumulate, size["length"] + 1))
    if device.type == "cuda":
        stream = stream.pin_memory()
    warm, start = max(1, steps // 3), time.perf_counter()
    begun = start
    for step in range(steps):
        if step == warm:
            wait(device)
            start = time.perf_counter()
        for rows in stream.split(micro):
            ids = rows.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16):
                loss = run(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) / accumulate
            loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wait(device)
    ended = time.perf_counter()
    matrices = sum(p.numel() for p in network.parameters() if p.ndim == 2) - network.positions.weight.numel()
    return {
        "tokens_per_second": (steps - warm) * stream.size(0) * size["length"] / (ended - start),
        "flops_per_token": 6 * matrices + 12 * size["layers"] * size["width"] * size["length"],
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": ended - begun,
    }


def wait(device: torch.device) -> None:
    """Waits until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
