"""How good a model is on a text: total cross-entropy in nats, and bits per byte, which compares tokenizers too.

In: a model and the validation split's tokens, or a package and texts. Every token of the split is predicted once.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from gptcore.model import GPT
from gptcore.package import Package
from train_job.batches import TokenStream, validation_batches


@torch.inference_mode()
def validation_nats(
    model: GPT, tokens: TokenStream, context_length: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Tensor:
    """This rank's share of the split's total cross-entropy, a float64 scalar in nats, in windows of context_length."""
    device = model.embed_tokens.weight.device
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for x, y in validation_batches(tokens, context_length, batch_size, rank, world_size):  # (b, T) each
        total += model(x.to(device), y.to(device))
    model.train(training)
    return total


class _InMemory:
    """Token ids in an array, read as a TokenSet is."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = np.asarray(ids, dtype=np.int64)
        self.num_tokens: int = len(ids)

    def read(self, start: int, length: int) -> np.ndarray:
        return self.ids[start : start + length]


def bits_per_byte(package: Package, texts: Iterable[str], device: str = "cpu") -> float:
    """Bits per UTF-8 byte of the texts under a package's model and its own tokenizer, in fp32."""
    ids, num_bytes = [package.tokenizer.eot], 0
    for text in texts:
        ids += [*package.tokenizer.encode(text), package.tokenizer.eot]
        num_bytes += len(text.encode())
    model = package.load_model(device)
    nats = validation_nats(model, _InMemory(ids), model.config.context_length, batch_size=8)
    return float(nats) / math.log(2) / num_bytes
