"""Evaluates a model on text: total cross-entropy in nats, and bits per byte, which is comparable across tokenizers.

In: a model and the validation split's tokens, or a package and a corpus. Every token of the split is predicted once.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from gptcore import progress
from gptcore.model import GPT
from gptcore.package import Package
from train_job.data.corpus import Corpus
from train_job.data.packing import all_batches, longest
from train_job.data.shards import TokenSet, prepare


@torch.no_grad()  # not inference_mode: what FSDP allocates here is used in training
def validation_nats(
    model: GPT, tokens: TokenSet, context_length: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Tensor:
    """This rank's part of the split's total cross-entropy in nats, a float64 scalar, in windows of context_length."""
    device = model.embed_tokens.weight.device
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    done, share = 0, tokens.num_tokens / world_size
    for parts in all_batches(tokens, context_length, batch_size, rank, world_size):  # (b, T) each
        total += model(*(part.to(device) for part in parts))
        progress.at(done := done + parts[0].numel(), share)
    model.train(training)
    return total


def bits_per_byte(package: Package, corpus: Corpus, cache_dir: Path, device: str = "cpu") -> float:
    """Bits per UTF-8 byte of a corpus, or of the answers in it, with the package's model and tokenizer, in fp32.

    Windows are as long as the sequences that the model was trained on, or its context if that is not recorded.
    """
    tokens = prepare(corpus, package.tokenizer, cache_dir)
    window = package.info.get("training", {}).get("sequence_length", package.config.context_length)
    if tokens.holds_conversations:
        window = min(window, longest(tokens))  # rows need not be longer, and the mask of long ones takes memory
    nats = validation_nats(package.load_model(device), tokens, window, batch_size=8)
    return float(nats) / math.log(2) / tokens.num_bytes
