"""The cross-entropy of an output head, a chunk of tokens at a time, so that the logits of a batch never exist at once.

For GPT-2's vocabulary the logits of 4,096 tokens and their gradient are 1.6 GB in fp32, more than all else in a small
model. Each chunk's gradient is computed in the forward pass, while its logits are there, as Liger Kernel does (Hsu et
al. 2024): nothing is computed twice, and backward only scales.
Shapes: N tokens, C = hidden_size, V = vocab_size, R tokens in a chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
"""A target with this value adds nothing to the loss."""
FEWEST_ROWS, SOFTMAX_ROWS = 1024, 256
"""The fewest tokens of a chunk, and those whose softmax is computed in fp32 at a time."""


def softmax_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits (R, V) for targets (R, 1): a fp32 vector (R,). Overwrites logits by softmax - onehot.

    Two maxima give the logarithm of the target's probability, log p_t = (z_t - max z) + log max p: log_softmax and exp
    would compute every exponential twice, and log p_t alone fails where p_t underflows.
    """
    z = logits.float()  # (R, V)
    p = z.softmax(-1)  # (R, V)
    logprob = z.gather(1, targets) - z.amax(-1, keepdim=True) + p.amax(-1, keepdim=True).log()  # (R, 1)
    logits.copy_(p).scatter_(1, targets, logprob.expm1().to(logits.dtype))
    return -logprob[:, 0]


def head_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softmax: Callable[..., Tensor] = softmax_loss
) -> Tensor:
    """The summed cross-entropy in nats of the logits `x @ weight.T`, a fp32 scalar.

    x is (N, C), weight (V, C), targets (N,) token ids or IGNORE. Products use autocast's dtype, the softmax fp32.
    `softmax` is softmax_loss, perhaps compiled.
    """
    loss: Tensor = _HeadCrossEntropy.apply(x, weight, targets, softmax, torch.is_grad_enabled())
    return loss


def chunk_rows(hidden_size: int) -> int:
    """R: enough tokens that adding each chunk's (V, C) gradient costs little beside the work on its (R, V) logits."""
    return max(FEWEST_ROWS, 2 * hidden_size)


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, softmax: Any, backward: bool) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        wanted = [backward and needed for needed in ctx.needs_input_grad[:2]]
        with torch.autocast(kind, enabled=False):
            loss, *ctx.gradients = _chunks(x, weight, dtype, targets, softmax, *wanted)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        return *(g if g is None else g.mul_(grad) for g in gradients), None, None, None


def _chunks(
    x: Tensor, weight: Tensor, dtype: torch.dtype, targets: Tensor, softmax: Any, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and the gradients of x and weight if they are wanted."""
    inputs, matrix = x.to(dtype), weight.to(dtype)
    loss = torch.zeros((), device=x.device)
    of_x = torch.empty_like(x) if wants_x else None
    of_weight = None
    for start in range(0, len(x), rows := chunk_rows(x.size(1))):
        part = slice(start, start + rows)
        counts = targets[part] != IGNORE  # (R,)
        of_logits = inputs[part] @ matrix.T  # (R, V), at first the logits
        for few, wanted, counted in zip(
            *(t.split(SOFTMAX_ROWS) for t in (of_logits, targets[part].clamp(min=0), counts)), strict=True
        ):
            loss += torch.where(counted, softmax(few, wanted[:, None]), 0.0).sum()
        if of_x is not None:
            of_x[part] = (of_logits @ matrix) * counts[:, None]  # (R, C)
        if wants_weight:
            product = of_logits.T @ (inputs[part] * counts[:, None])  # (V, C)
            of_weight = product.to(weight.dtype) if of_weight is None else of_weight.add_(product)
    return loss, of_x, of_weight
