"""(seed, step) -> batch, for conversations: several share a row, none is cut, and none sees another.

In: a TokenSet of conversations. Out: rows of token ids, of targets, of which only those of the answers count, and of
positions, which begin at 0 in each conversation. As in `train_job.data.batches`, a batch is computed from the seed and
the step alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from gptcore.errors import ConfigError, CorpusError
from gptcore.loss import IGNORE
from train_job.data.batches import Batches, epoch_keys, permute, share, validation_batches
from train_job.data.conversation_tokens import ANSWER, FIRST, ID
from train_job.data.shards import TokenSet, map_shard


@dataclass(frozen=True)
class Rows:
    """Conversations packed into rows of at most `context_length` tokens.

    Row n has the parts `order[borders[n] : borders[n + 1]]`. Part p begins at word `starts[p]` of the stream and has
    `lengths[p]` tokens, of which `answered[p]` are targets.
    """

    starts: np.ndarray
    lengths: np.ndarray
    answered: np.ndarray
    order: np.ndarray
    borders: np.ndarray
    cut: int
    """Conversations that are longer than a row, each divided into parts that do not see each other."""

    def __len__(self) -> int:
        return len(self.borders) - 1

    @cached_property
    def targets(self) -> np.ndarray:
        """The targets in each row, int64 (rows,)."""
        return np.add.reduceat(self.answered[self.order], self.borders[:-1])


@lru_cache(maxsize=4)
def pack(tokens: TokenSet, context_length: int) -> Rows:
    """Packs all conversations of the stream. Raises CorpusError if nothing in them is an answer."""
    starts, lengths, answered, cut = [], [], [], 0
    for shard, offset in zip(tokens.shards, tokens.starts, strict=True):
        words = map_shard(shard.path, tokens.dtype)
        begins = np.flatnonzero(words & FIRST)
        pairs = np.diff(begins, append=len(words)) - 1  # of a token and the next one
        cut += int((pairs > context_length).sum())
        pieces = -(-pairs // context_length)
        number = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)  # of a part in its conversation
        first = np.repeat(begins, pieces) + number * context_length
        length = np.minimum(np.repeat(begins + pairs, pieces) - first, context_length)
        before = np.concatenate([[0], np.cumsum((words & ANSWER) != 0)])
        starts.append(first + offset)
        lengths.append(length)
        answered.append(before[first + length + 1] - before[first + 1])
    kept = np.concatenate(answered) > 0
    if not kept.any():
        raise CorpusError("the conversations have no token of an answer to learn")
    all_lengths = np.concatenate(lengths)[kept]
    order, borders = best_fit(all_lengths, context_length)
    return Rows(np.concatenate(starts)[kept], all_lengths, np.concatenate(answered)[kept], order, borders, cut)


def longest(tokens: TokenSet) -> int:
    """Tokens of the longest conversation, less the last one, which is only a target."""
    streams = ((map_shard(shard.path, tokens.dtype)) for shard in tokens.shards)
    return max(int(np.diff(np.flatnonzero(words & FIRST), append=len(words)).max()) for words in streams) - 1


def best_fit(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs items into rows, the longest first, each into the fullest row that has room (best-fit decreasing).

    Returns the items (n,) row after row, and where rows begin in them (rows + 1,). As for texts in Ding et al. 2024.
    """
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # rows by the room that is left in them
    known = 0  # bit n: there is a row with room for exactly n
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = known >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = room[left].pop()
            known ^= (not room[left]) << left
        else:
            left, row = size, len(rows)
            rows.append([])
        rows[row].append(item)
        if left > length:
            room.setdefault(left - length, []).append(row)
            known |= 1 << (left - length)
    borders = np.cumsum([0, *map(len, rows)])
    return np.array([item for row in rows for item in row], dtype=np.int64), borders


class ConversationBatches:
    """Training batches of packed conversations, as a function of the step; each epoch visits every row once.

    Raises CorpusError if there is nothing to learn, ConfigError for a size below 1.
    """

    def __init__(self, tokens: TokenSet, context_length: int, batch_size: int, seed: int) -> None:
        if context_length < 1 or batch_size < 1:
            raise ConfigError(f"context_length {context_length} and batch_size {batch_size}: expected at least 1")
        self.tokens, self.context_length, self.batch_size, self.seed = tokens, context_length, batch_size, seed
        self.rows = pack(tokens, context_length)

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every row is seen once."""
        return len(self.rows) / self.batch_size

    def row_numbers(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """The rank's rows of global batch `step`, int64 (b,)."""
        first, last = share(self.batch_size, rank, world_size)
        sample = np.arange(first, last, dtype=np.uint64) + np.uint64(step * self.batch_size)
        epoch, index = np.divmod(sample, np.uint64(len(self.rows)))
        return permute(index, len(self.rows), epoch_keys(self.seed, epoch, purpose=0)).astype(np.int64)

    def targets(self, step: int) -> int:
        """The tokens of answers in global batch `step`."""
        return int(self.rows.targets[self.row_numbers(step)].sum())

    def answered(self, steps: range) -> float:
        """The share of the tokens in these batches that are targets."""
        return sum(map(self.targets, steps)) / (len(steps) * self.batch_size * self.context_length)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, ...]:
        """The rank's rows of global batch `step` (from 0): inputs, targets and positions, int64 (b, T) each."""
        return filled(self.tokens, self.rows, self.row_numbers(step, rank, world_size), self.context_length)


def filled(tokens: TokenSet, rows: Rows, numbers: np.ndarray, context_length: int) -> tuple[Tensor, ...]:
    """Inputs, targets and positions of the rows with these numbers, int64 (b, T) each.

    A row's spare tokens are texts of one token without a target.
    """
    x, at = np.zeros((2, len(numbers), context_length), dtype=np.int64)
    y = np.full_like(x, IGNORE)
    for row, number in enumerate(numbers.tolist()):
        column = 0
        for part in rows.order[rows.borders[number] : rows.borders[number + 1]].tolist():
            length = int(rows.lengths[part])
            words = tokens.read(int(rows.starts[part]), length + 1).astype(np.uint32)
            ids, place = (words & ID).astype(np.int64), slice(column, column + length)
            x[row, place], at[row, place] = ids[:-1], np.arange(length)
            y[row, place] = np.where(words[1:] & ANSWER, ids[1:], IGNORE)
            column += length
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(at)


def validation_rows(
    tokens: TokenSet, context_length: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, ...]]:
    """The rank's share of all rows as (x, y, positions), int64 (b, T) each, b <= batch_size.

    Every token of an answer is a target exactly once. Every rank gets as many batches; an additional one has no
    targets.
    """
    rows = pack(tokens, context_length)
    first, last = share(len(rows), rank, world_size)
    batches = math.ceil(math.ceil(len(rows) / world_size) / batch_size)
    for start in range(first, first + batches * batch_size, batch_size):
        numbers = np.arange(start, min(start + batch_size, last))
        if numbers.size:
            yield filled(tokens, rows, numbers, context_length)
        else:
            x, y, at = filled(tokens, rows, np.zeros(1, dtype=np.int64), context_length)
            yield x, torch.full_like(y, IGNORE), at


def training_batches(
    tokens: TokenSet, context_length: int, batch_size: int, seed: int, stride: int | None = None
) -> Batches | ConversationBatches:
    """The batches of a text or of conversations. Raises CorpusError if it is too short, ConfigError."""
    if tokens.holds_conversations:
        return ConversationBatches(tokens, context_length, batch_size, seed)
    return Batches(tokens, context_length, batch_size, seed, stride)


def all_batches(
    tokens: TokenSet, context_length: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, ...]]:
    """The rank's share of the whole stream, in which every target occurs once."""
    every = validation_rows if tokens.holds_conversations else validation_batches
    yield from every(tokens, context_length, batch_size, rank, world_size)
