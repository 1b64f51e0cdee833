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


def softmax_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits (R, V) for targets (R, 1): a fp32 vector (R,), and softmax - onehot (R, V) as logits."""
    logprobs = logits.float().log_softmax(-1)  # (R, V)
    picked = logprobs.gather(1, targets)  # (R, 1)
    gradient = logprobs.exp_().to(logits.dtype)
    return -picked[:, 0], gradient.scatter_(1, targets, picked.expm1().to(logits.dtype))


def head_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softmax: Callable[..., tuple[Tensor, Tensor]] = softmax_loss
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
        ctx.gradients = (torch.empty_like(x), torch.zeros_like(weight)) if backward else None
        with torch.autocast(kind, enabled=False):
            return _chunks(x.to(dtype), weight.to(dtype), targets, softmax, ctx.gradients)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (of_x, of_weight), ctx.gradients = ctx.gradients, None
        return of_x.mul_(grad), of_weight.mul_(grad), None, None, None


def _chunks(
    x: Tensor, weight: Tensor, targets: Tensor, softmax: Any, gradients: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The loss; writes the gradients of x and weight into `gradients`."""
    total = torch.zeros((), device=x.device)
    for start in range(0, len(x), rows := chunk_rows(x.size(1))):
        part = slice(start, start + rows)
        counts = targets[part] != IGNORE  # (R,)
        of_logits = x[part] @ weight.T  # (R, V), at first the logits
        for few, wanted, counted in zip(
            *(t.split(SOFTMAX_ROWS) for t in (of_logits, targets[part].clamp(min=0), counts)), strict=True
        ):
            losses, gradient = softmax(few, wanted[:, None])
            total += torch.where(counted, losses, 0.0).sum()
            if gradients is not None:
                few.copy_(gradient)
        if gradients is None:
            continue
        of_x, of_weight = gradients
        of_x[part] = (of_logits @ weight) * counts[:, None]  # (R, C)
        rows_that_count = x[part] * counts[:, None]  # (R, C)
        if x.dtype == of_weight.dtype:
            of_weight.addmm_(of_logits.T, rows_that_count)  # (V, C)
        else:
            of_weight.add_(of_logits.T @ rows_that_count)
    return total
