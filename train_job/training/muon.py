"""Muon (Jordan et al. 2024), whose work is divided among the workers.

In: matrices with gradients, whole or sharded by rows. Muon orthogonalises the momentum of each matrix, by products that
need the whole matrix. Each worker does that for its share of the matrices, and the workers exchange the results.
torch.optim.Muon does all of the work on every worker and cannot have sharded matrices.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from gptcore.devices import pick_dtype
from train_job.training.parallel import first_row, local, world_size

COEFFICIENTS = (
    (8.222, -23.3485, 16.6351),
    (3.9728, -2.845, 0.517),
    (3.4735, -2.5057, 0.481),
    (2.5043, -1.7907, 0.4071),
)
"""a, b and c of each round's a·σ + b·σ³ + c·σ⁵. Together they bring singular values of 0.003 to 1 as close to 1 as four
such polynomials can, with 2% of room in each for bf16's rounding (Amsel et al. 2025, "Polar Express")."""
TOGETHER = 1 << 22
"""The most numbers that are orthogonalised at once by a worker that is alone."""


def orthogonalise(updates: Tensor) -> Tensor:
    """The nearest matrices with singular values of about 1, by Newton-Schulz iterations: (N, R, C), the result in bf16.

    The products are in bf16 too if the device has instructions for it. If not, fp32 is several times as fast, and
    precise enough to work on the Gram matrices alone, which is less work if one side is long.
    """
    tall = updates.size(1) > updates.size(2)
    x = (updates.mT if tall else updates).to(pick_dtype("auto", updates.device))
    gram = x @ x.mT
    bound = torch.linalg.matrix_norm(gram, keepdim=True).clamp(min=1e-14)  # of the largest singular value's square
    x, gram = x / bound.sqrt(), gram / bound
    if x.dtype == torch.float32 and 2 * x.size(2) > 3 * x.size(1):
        x = _polynomial(gram) @ x
    else:
        for number, (a, b, c) in enumerate(COEFFICIENTS):
            gram = x @ x.mT if number else gram
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).bfloat16()


def _polynomial(gram: Tensor) -> Tensor:
    """The product of all rounds' factors for Gram matrices, (N, R, R); a round turns G into P·G·P."""
    first, *others = COEFFICIENTS
    product = factor = _factor(gram, *first)
    for coefficients in others:
        gram = factor @ gram @ factor
        factor = _factor(gram, *coefficients)
        product = factor @ product
    return product


def _factor(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """P = a + b·G + c·G², (N, R, R)."""
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


def work(shape: Iterable[int]) -> int:
    """The floating-point operations of `orthogonalise` on a matrix of this shape, in bf16."""
    short, long = sorted(shape)
    return len(COEFFICIENTS) * (4 * short**2 * long + 2 * short**3)


class Muon(torch.optim.Optimizer):
    """Muon for matrices that are all whole or all sharded by rows.

    They are sorted by their work and dealt out, one to each worker at a time. So no worker does more than its share and
    one matrix, and of sharded matrices none holds more than one whole. A single worker takes all of one shape at once.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for together in _batches([p for p in group["params"] if p.grad is not None]):
                self._update(together, group)

    def _update(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        momentum, decay = group["momentum"], 1 - group["lr"] * group["weight_decay"]
        updates = []
        for p in matrices:
            gradient, mean = local(p.grad), local(self.state[p]["momentum_buffer"])  # type: ignore[arg-type]
            mean.lerp_(gradient, 1 - momentum)
            updates.append(gradient.lerp(mean, momentum).bfloat16())  # Nesterov's
        for p, update in zip(matrices, _exchanged(matrices, updates), strict=True):
            rate = group["lr"] * math.sqrt(max(1, p.size(0) / p.size(1)))
            local(p).mul_(decay).add_(update, alpha=-rate)


def _batches(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """The matrices that are updated together: one for each worker, the largest first, or those of one shape alone."""
    if (workers := world_size()) > 1:
        dealt = sorted(matrices, key=lambda p: -work(p.shape))
        yield from (dealt[start : start + workers] for start in range(0, len(dealt), workers))
        return
    for shape, group in groupby(sorted(matrices, key=lambda p: p.shape), key=lambda p: p.shape):
        alike, most = list(group), max(1, TOGETHER // shape.numel())
        yield from (alike[start : start + most] for start in range(0, len(alike), most))


def _exchanged(matrices: list[Tensor], updates: list[Tensor]) -> Iterable[Tensor]:
    """The updates of matrices that belong together, orthogonalised, each by one worker."""
    if world_size() == 1:
        return orthogonalise(torch.stack(updates))
    return _of_shards(matrices, updates) if isinstance(matrices[0], DTensor) else _of_replicas(updates)


def _of_replicas(updates: list[Tensor]) -> list[Tensor]:
    """Every worker has all updates; each sends its result to all."""
    rank = dist.get_rank()
    if rank < len(updates):
        updates[rank] = orthogonalise(updates[rank][None])[0].contiguous()
    for sent in [dist.broadcast(update, src=owner, async_op=True) for owner, update in enumerate(updates)]:
        sent.wait()
    return updates


def _of_shards(matrices: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
    """Every worker has some rows of each update; it gets all rows of one and sends back those of the result."""
    rank, workers = dist.get_rank(), world_size()
    sent = [update.numel() for update in updates] + [0] * (workers - len(updates))
    received, mine = [0] * workers, None
    if rank < len(matrices):
        mine = matrices[rank].shape
        starts = [first_row(mine[0], r, workers) for r in range(workers + 1)]
        received = [(end - start) * mine[1] for start, end in pairwise(starts)]
    rows = torch.cat([update.flatten() for update in updates])
    gathered = rows.new_empty(sum(received))
    dist.all_to_all_single(gathered, rows, received, sent)
    if mine is not None:
        gathered = orthogonalise(gathered.view(1, *mine)).flatten()
    dist.all_to_all_single(rows, gathered, sent, received)
    return [result.view_as(u) for result, u in zip(rows.split(sent), updates, strict=False)]
