"""How the blocks of a model are run in training: recomputed in the backward pass, compiled.

In: a model and a config. Out: the same model, which computes the same.
"""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from gptcore.model import GPT
from train_job.config import TrainConfig


def prepare_model(model: GPT, config: TrainConfig) -> None:
    """Sets up activation checkpointing (Chen et al. 2016) and torch.compile, each a block at a time.

    All blocks share one compilation, so it takes as long as that of one block. The batches of a run have few shapes,
    and fixed ones make faster kernels; the loss's chunks differ more.
    """
    for layer in model.layers:
        if config.checkpoint_activations:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if config.compile:  # around checkpoint, which does not let itself be compiled from outside
            layer.forward = torch.compile(layer.forward, dynamic=False)
    if config.compile:
        model.softmax_loss = torch.compile(model.softmax_loss, dynamic=True)
