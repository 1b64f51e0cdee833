"""(seed, step) -> batch: which tokens step N sees, for any world size.

In: a TokenSet and a seed. Out: (x, y) pairs of token ids. There is no random generator with state: a training batch is
computed from the seed and the step alone, so a resumed run, or one that lost a node, sees the same tokens in the same
order. Validation is not sampled: every token is a target exactly once.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gptcore.errors import ConfigError, CorpusError
from gptcore.loss import IGNORE
from train_job.data.shards import TokenSet

ROUNDS = 8
"""Feistel rounds. Four are enough for long epochs (Luby and Rackoff 1988), but are biased with only ten windows."""
GOLDEN = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio: splitmix64's step from one hash to the next."""


def mix(x: np.ndarray) -> np.ndarray:
    """Hashes uint64 to uint64, bijectively, with the finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def epoch_keys(seed: int, epochs: np.ndarray, purpose: int) -> np.ndarray:
    """One hash (n,) per (seed, epoch (n,), purpose): the source of all randomness here."""
    start = mix(np.array([(seed + GOLDEN) % 2**64], dtype=np.uint64))
    return mix(mix(start + epochs) + np.uint64((purpose + 1) * GOLDEN % 2**64))


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Maps index (n,) by the permutation of range(size) that keys (n,) choose, in O(n) memory for any size.

    A Feistel network over pairs below ceil(sqrt(size)), so its domain is hardly larger than `size`; an image
    outside is permuted again until it is inside (Black and Rogaway 2002).
    """
    side = np.uint64(math.isqrt(size - 1) + 1)
    left, right = np.divmod(index, side)
    for n in range(ROUNDS):
        left, right = right, (left + mix((right + np.uint64(n * GOLDEN % 2**64)) ^ keys) % side) % side
    image = left * side + right
    outside = np.flatnonzero(image >= size)
    if outside.size:
        image[outside] = permute(image[outside], size, keys[outside])
    return image


def share(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """The rows [start, end) of `size` rows that belong to `rank`; shares differ by at most one row."""
    return size * rank // world_size, size * (rank + 1) // world_size


class Batches:
    """Training batches over a token stream, as a function of the step.

    Windows of context_length + 1 tokens start `stride` apart (default: context_length). Each epoch visits every
    window once, in its own order, and shifts them all by its own phase in [0, stride), so that context borders
    move. A shifted window that would pass the stream's end starts again at its beginning.

    Raises CorpusError if the stream is shorter than one window, ConfigError for a size below 1.
    """

    def __init__(
        self, tokens: TokenSet, context_length: int, batch_size: int, seed: int, stride: int | None = None
    ) -> None:
        stride = context_length if stride is None else stride
        for name, value in (("context_length", context_length), ("batch_size", batch_size), ("stride", stride)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1")
        self.starts = tokens.num_tokens - context_length  # positions where a window can start
        if self.starts < 1:
            raise CorpusError(
                f"the training text has {tokens.num_tokens} tokens, fewer than context_length {context_length} + 1; "
                f"give more text, or a context_length of at most {max(tokens.num_tokens - 1, 0)}"
            )
        self.tokens, self.context_length, self.batch_size = tokens, context_length, batch_size
        self.seed, self.stride = seed, stride
        self.windows = -(-self.starts // stride)

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every window is seen once."""
        return self.windows / self.batch_size

    def window_starts(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Positions in the stream where the rank's windows of global batch `step` start, int64 (b,)."""
        first, last = share(self.batch_size, rank, world_size)
        sample = np.arange(first, last, dtype=np.uint64) + np.uint64(step * self.batch_size)
        epoch, index = np.divmod(sample, np.uint64(self.windows))
        window = permute(index, self.windows, epoch_keys(self.seed, epoch, purpose=0))
        phase = epoch_keys(self.seed, epoch, purpose=1) % np.uint64(self.stride)
        return ((window * np.uint64(self.stride) + phase) % np.uint64(self.starts)).astype(np.int64)

    def answered(self, steps: range) -> None:
        """None: text has no answers."""

    def targets(self, step: int) -> int:
        """The tokens to predict in global batch `step`, which are the same number in each."""
        return self.batch_size * self.context_length

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        """The rank's rows of global batch `step` (from 0): inputs and targets, int64 (b, T) each."""
        starts = self.window_starts(step, rank, world_size)
        rows = torch.from_numpy(self.tokens.gather(starts, self.context_length + 1))  # (b, T + 1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def validation_batches(
    tokens: TokenSet, context_length: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rank's share of the whole stream as (x, y), int64 (b, T) each, b <= batch_size.

    Windows do not overlap: over all ranks every token except the first is a target exactly once. The last
    window is padded, its spare targets are IGNORE. Every rank gets as many batches; an additional one has no targets.
    """
    T, targets = context_length, tokens.num_tokens - 1
    windows = math.ceil(targets / T)
    first, last = share(windows, rank, world_size)
    batches = math.ceil(math.ceil(windows / world_size) / batch_size)
    for window in range(first, first + batches * batch_size, batch_size):
        rows = max(1, min(batch_size, last - window))
        count = min(rows * T, targets - window * T) if window < last else 0  # targets in this batch
        stream = tokens.read(window * T if count else 0, count + 1)
        x, y = np.zeros(rows * T, dtype=np.int64), np.full(rows * T, IGNORE, dtype=np.int64)
        x[:count], y[:count] = stream[:-1], stream[1:]
        yield torch.from_numpy(x).view(rows, T), torch.from_numpy(y).view(rows, T)
