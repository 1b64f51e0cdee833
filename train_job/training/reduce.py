"""How workers average gradients.

In: a tensor on every worker. Out: its mean, on every worker or a part on each. NCCL averages by itself. On CPUs, gloo
adds up each part of a tensor in an order of its own, so the last bit of a sum depends on where in the tensor it lies,
and Muon, which rounds to bf16, turns a last bit into more. With three or more workers they therefore add up in the
order of the ranks, and DDP and FSDP average to the same bits. As much is sent as in gloo's ring.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def in_rank_order(device: torch.device) -> bool:
    """Whether to add up in the order of the ranks. Two numbers have the same sum in any order."""
    return device.type == "cpu" and dist.get_world_size() > 2


def set_reduction(model: DistributedDataParallel | FSDPModule, precision: str, device: torch.device) -> None:
    """Sets how a model's gradients are averaged in a backward pass. FSDP has the precision in its own policy."""
    if isinstance(model, FSDPModule):
        if in_rank_order(device):
            model.set_custom_reduce_scatter(_RankOrder())  # type: ignore[arg-type]
    elif precision == "bf16":
        model.register_comm_hook(None, _average_in_bf16)
    elif in_rank_order(device):
        model.register_comm_hook(None, _average_in_fp32)


@torch.no_grad()
def average_vectors(parameters: Iterable[Tensor]) -> None:
    """Averages the gradients of whole parameters, as FSDP does those of sharded ones."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    _average(together).wait()
    for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _average(tensor: Tensor) -> torch.futures.Future[Any]:
    """Averages a vector in place; done when the future is."""
    workers = dist.get_world_size()
    if not in_rank_order(tensor.device):
        return dist.all_reduce(tensor.div_(workers), async_op=True).get_future()
    padded = tensor.new_zeros(math.ceil(tensor.numel() / workers) * workers)
    padded[: tensor.numel()] = tensor
    dist.all_gather_into_tensor(padded, _mean_of_part(padded))
    done: torch.futures.Future[Any] = torch.futures.Future()
    done.set_result(tensor.copy_(padded[: tensor.numel()]))
    return done


def _mean_of_part(whole: Tensor) -> Tensor:
    """The mean of this worker's part of a vector, (N * K) to (K) for N workers, added up in the order of the ranks."""
    received = torch.empty_like(whole)
    dist.all_to_all_single(received, whole)
    total, *others = received.chunk(dist.get_world_size())
    for part in others:
        total += part
    return total.div_(dist.get_world_size())


def _average_in_fp32(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A hook of DDP for a bucket of gradients."""
    return _average(bucket.buffer()).then(lambda _: bucket.buffer())


def _average_in_bf16(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A hook of DDP for a bucket of gradients; torch's own is refused without NCCL."""
    rounded = bucket.buffer().bfloat16()
    return _average(rounded).then(lambda _: bucket.buffer().copy_(rounded))


class _RankOrder:
    """A reduce-scatter as FSDPModule.set_custom_reduce_scatter wants it."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *_: object, **options: object) -> None:
        output_tensor.copy_(_mean_of_part(input_tensor))
