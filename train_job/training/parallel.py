"""How several workers train one model, and how its blocks are run: sharded, recomputed, compiled.

In: a model and a config. Out: a model that computes the same. With `ddp` each worker has all of it (torch's
DistributedDataParallel). With `fsdp` (FSDP2's fully_shard; Zhao et al. 2023) each has its share of the rows of every
matrix, with its gradient and optimizer state, and fetches a block's matrices while it computes the block. Vectors
(gains and biases, a thousandth of the weights) and adapters stay whole on every worker.
"""

import math
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gptcore.devices import pick_dtype
from gptcore.lora import is_adapter
from gptcore.model import GPT
from gptcore.rotary import rotary_tables
from train_job.config import TrainConfig
from train_job.training.reduce import set_reduction


def world_size() -> int:
    """The number of workers, 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_sharded(config: TrainConfig) -> bool:
    """Whether the run's workers divide the model among them."""
    return config.parallel == "fsdp" and world_size() > 1


def prepare_model(model: GPT, config: TrainConfig) -> None:
    """Sets up activation checkpointing (Chen et al. 2016) and torch.compile, each a block at a time.

    All blocks share one compilation, so it takes as long as that of one block; with adapters there are two, since the
    first block's input needs no gradient. The batches of a run have few shapes,
    and fixed ones make faster kernels; the loss's chunks differ more.
    """
    for layer in model.layers:
        if config.checkpoint_activations:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if config.compile:  # around checkpoint, which does not let itself be compiled from outside
            layer.forward = torch.compile(layer.forward, dynamic=False)
    if config.compile:
        model.softmax_loss = torch.compile(model.softmax_loss, dynamic=True)


def replicate(model: GPT, config: TrainConfig, device: torch.device) -> nn.Module:
    """The module to call in training: the model, or with several workers DDP around it, which averages gradients."""
    if world_size() == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its successor is not in every torch that this runs with
        replica = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
        )
    set_reduction(replica, config.reduce_precision, device)
    return replica


def shard(model: GPT, config: TrainConfig, device: torch.device) -> None:
    """Leaves this worker its rows of each matrix; a model on the meta device becomes one with memory for these alone.

    Blocks fetch their matrices in the dtype of autocast, which would convert them anyway. The embeddings and the head
    are used in fp32, so they are fetched in fp32, and stay until backward has ended. So a step computes what a step
    of DDP does.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    reduced = torch.bfloat16 if config.reduce_precision == "bf16" else torch.float32
    policy = partial(MixedPrecisionPolicy, reduce_dtype=reduced, cast_forward_inputs=False)
    whole = {p for name, p in model.named_parameters() if p.ndim < 2 or is_adapter(name)}
    options: dict[str, Any] = dict(mesh=mesh, ignored_params=whole)
    empty = model.embed_tokens.weight.is_meta
    dtype = pick_dtype(config.precision, device)
    for layer in model.layers:
        set_reduction(
            fully_shard(layer, mp_policy=policy(param_dtype=dtype), **options), config.reduce_precision, device
        )
    set_reduction(fully_shard(model, mp_policy=policy(), **options), config.reduce_precision, device)
    if empty:
        materialise(model, device)
    else:
        model.to(device)


def materialise(model: GPT, device: torch.device) -> None:
    """Gives a model on the meta device memory, of a sharded one for its share; `fill` gives it values."""
    model.to_empty(device=device)
    if model.config.tie_embeddings:  # to_empty makes two of one
        model.lm_head.weight = model.embed_tokens.weight
    if model.config.rotary:
        model.cos, model.sin = (table.to(device) for table in rotary_tables(model.config))


def unused_after(model: nn.Module) -> None:
    """Frees what a forward pass without a backward pass has fetched."""
    if isinstance(model, FSDPModule):
        model.reshard()


def local(tensor: Tensor) -> Tensor:
    """This worker's rows of a tensor, or the tensor itself if it is whole; they share memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(rows: int, rank: int, workers: int) -> int:
    """The first of a matrix's rows that `rank` has, or `rows` if it has none: as torch.chunk divides them."""
    return min(rows, rank * math.ceil(rows / workers))


@torch.no_grad()
def fill(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copies whole weights into the parameters of these names, of which a worker may have only some rows."""
    parameters = dict(model.named_parameters())
    for name, weight in weights:
        parameter = parameters[name]
        if isinstance(parameter, DTensor):
            rank, workers = dist.get_rank(), dist.get_world_size()
            start, end = (first_row(len(weight), r, workers) for r in (rank, rank + 1))
            weight = weight[start:end]
        local(parameter).copy_(weight)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], most: float) -> Tensor:
    """Scales all gradients so that their common norm is at most `most`; returns the norm before, a scalar.

    With several workers it is summed in fp64, so that it does not depend on how they divide the model.
    """
    trained = [p for p in parameters if p.grad is not None]
    if world_size() == 1:
        return nn.utils.clip_grad_norm_(trained, most)
    sharded = [local(p.grad) for p in trained if isinstance(p, DTensor) and p.grad is not None]
    whole = [p.grad for p in trained if not isinstance(p, DTensor) and p.grad is not None]
    squares = _squares(whole)
    if sharded:
        ours = _squares(sharded)
        dist.all_reduce(ours)
        squares += ours
    norm = squares.sqrt().float()
    torch._foreach_mul_([*sharded, *whole], (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _squares(tensors: list[Tensor]) -> Tensor:
    """The sum of the squares of all elements, in fp64."""
    return torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]).square().sum()
