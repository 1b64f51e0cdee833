"""Muon (Jordan et al. 2024), whose work is divided among the workers.

In: matrices with gradients, whole or sharded by rows. Muon orthogonalises the momentum of each matrix, by products that
need the whole matrix. Each worker does that for its share of the matrices, and the workers exchange the results. The
numbers are those of torch.optim.Muon, where the device has instructions for bf16; torch's does all of the work on every
worker and cannot have sharded matrices.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from gptcore.devices import pick_dtype
from train_job.training.parallel import first_row, local, world_size

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that brings singular values close to 1 the fastest (Jordan et al. 2024)."""
ROUNDS = 5


def orthogonalise(update: Tensor) -> Tensor:
    """The nearest matrix with singular values of about 1, in bf16, by Newton-Schulz iterations; (R, C) both.

    Its products are in bf16 too if the device has instructions for it. If not, fp32 is several times as fast.
    """
    a, b, c = COEFFICIENTS
    tall = update.size(0) > update.size(1)
    x = update.to(pick_dtype("auto", update.device))
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).bfloat16()


def work(shape: Iterable[int]) -> int:
    """The floating-point operations of `orthogonalise` on a matrix of this shape."""
    short, long = sorted(shape)
    return ROUNDS * (4 * short**2 * long + 2 * short**3)


class Muon(torch.optim.Optimizer):
    """Muon for matrices that are all whole or all sharded by rows.

    Matrices are sorted by their work and dealt out in rounds, one to each worker. So no worker does more than its share
    and one matrix, and of sharded matrices none holds more than one whole.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        workers = world_size()
        for group in self.param_groups:
            matrices = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: -work(p.shape))
            for start in range(0, len(matrices), workers):
                self._update(matrices[start : start + workers], group)

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


def _exchanged(matrices: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
    """The updates of at most as many matrices as there are workers, each orthogonalised by one of them."""
    if world_size() == 1:
        return [orthogonalise(update) for update in updates]
    return _of_shards(matrices, updates) if isinstance(matrices[0], DTensor) else _of_replicas(updates)


def _of_replicas(updates: list[Tensor]) -> list[Tensor]:
    """Every worker has all updates; each sends its result to all."""
    rank = dist.get_rank()
    if rank < len(updates):
        updates[rank] = orthogonalise(updates[rank]).contiguous()
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
        gathered = orthogonalise(gathered.view(mine)).flatten()
    dist.all_to_all_single(rows, gathered, sent, received)
    return [result.view_as(u) for result, u in zip(rows.split(sent), updates, strict=False)]
