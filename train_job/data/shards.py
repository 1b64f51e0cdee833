"""Tokenises a corpus into shards: a corpus and a tokenizer go in, a memory-mapped stream of token ids comes out.

The stream of a split starts with one end-of-text token, and one follows every document, so each token of text is
predicted from something. If the tokenizer has a token for the beginning of a text (Llama's BOS), the stream starts with
that, and one follows every end-of-text token. Conversations have another stream, which
`train_job.data.conversation_tokens` makes. The stream is stored in shard files, named after a hash of text, tokenizer
and format: a second run finds them and starts at once, and a corpus larger than memory is read from disk. Missing
shards are fetched from a `store`, a URL that machines share, if there is one; else they are tokenised through
`mapper`: `map`, or Ray Data's (`train_job.cluster.ray_data.ray_map`).
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import tiktoken

from gptcore.chat import template_source
from gptcore.errors import CorpusError, FoundryError
from gptcore.merges import cut_long_space
from gptcore.progress import at, doing
from gptcore.stores import file_system
from gptcore.tokenizer import Tokenizer
from train_job.data.conversation_tokens import WORD, ConversationWords
from train_job.data.conversations import CONVERSATION, messages_of
from train_job.data.corpus import Corpus, Piece
from train_job.files import write_json, written_whole

SHARD_FORMAT, CONVERSATION_FORMAT = 1, 1
SHARD_BYTES = 4 * 2**20
"""Adjacent pieces share a shard up to this size, so that many small files do not become many shards."""
BLOCK_CHARS = 2**20
"""A document is tokenised in blocks of about this many characters, to limit memory; the tokens are the same."""


class ShardChanged(RuntimeError):
    """A file of tokens was changed while it was in use. Not a FoundryError: a worker that starts again makes it new."""


@dataclass(frozen=True)
class ShardTask:
    """The pieces of one shard. `opens`: it is the first of the stream; `closes`: its last document ends in it."""

    pieces: tuple[Piece, ...]
    opens: bool
    closes: bool

    @property
    def holds_conversations(self) -> bool:
        """Whether the documents are conversations."""
        return self.pieces[0].column == CONVERSATION


@dataclass(frozen=True)
class Shard:
    """One file of token ids, and its counts; `num_bytes` is the UTF-8 length of its text, or of the answers in it."""

    path: str
    num_tokens: int
    num_bytes: int
    num_documents: int
    num_answered: int = 0
    """Tokens of answers, in conversations."""
    modified_ns: int = 0
    """When the file was last changed, as the system says."""


@dataclass(frozen=True)
class TokenSet:
    """The token stream of one split. Picklable; the process that reads it maps the files."""

    shards: tuple[Shard, ...]
    starts: tuple[int, ...]  # of each shard in the stream
    dtype: str
    fingerprint: str
    holds_conversations: bool = False

    @property
    def num_tokens(self) -> int:
        """Length of the stream, end-of-text tokens included."""
        return self.starts[-1] + self.shards[-1].num_tokens

    @property
    def num_targets(self) -> int:
        """Tokens that a model has to predict: all but the first, or those of the answers in conversations."""
        if self.holds_conversations:
            return sum(shard.num_answered for shard in self.shards)
        return self.num_tokens - 1

    @property
    def size(self) -> str:
        """How much there is, in words."""
        return f"{self.num_documents:,} conversations" if self.holds_conversations else f"{self.num_bytes:,} bytes"

    @property
    def num_documents(self) -> int:
        """Documents that end in the stream."""
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text, or of the answers in conversations, for bits per byte."""
        return sum(shard.num_bytes for shard in self.shards)

    def check_unchanged(self) -> None:
        """Raises ShardChanged if a file was changed since `prepare`. A deleted one can be read where it is mapped."""
        for shard in self.shards:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(shard.path).st_mtime_ns != shard.modified_ns:
                    raise ShardChanged(f"token shard {shard.path} was changed while it was in use")

    def read(self, start: int, length: int) -> np.ndarray:
        """The stream's tokens [start, start + length), int64 (length,). Raises IndexError beyond its ends."""
        return self.gather(np.array([start]), length)[0]

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The tokens [s, s + length) for each s of `starts` (n,), int64 (n, length). Raises IndexError."""
        if starts.size and (starts.min() < 0 or starts.max() + length > self.num_tokens):
            raise IndexError(f"tokens up to {starts.max() + length} of a stream of {self.num_tokens}")
        rows = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            filled, number = 0, bisect_right(self.starts, start) - 1
            while filled < length:
                offset = start + filled - self.starts[number]
                part = map_shard(self.shards[number].path, self.dtype)[offset : offset + length - filled]
                row[filled : filled + len(part)] = part
                filled, number = filled + len(part), number + 1
        return rows


@lru_cache(maxsize=256)  # each mapping holds a file descriptor
def map_shard(path: str, dtype: str) -> np.ndarray:
    """Maps the shard's tokens read-only. Raises CorpusError if the file is not on this machine."""
    try:
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
    except FileNotFoundError:
        raise CorpusError(
            f"token shard {path} is not on this machine; put the cache on storage that every node can read, "
            "or run again to recreate it"
        ) from None


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    cache_dir: Path,
    mapper: Callable[[Callable[[ShardTask], Any], list[ShardTask]], Iterable[Any]] = map,
    store: str | None = None,
) -> TokenSet:
    """Tokenises what is neither in `cache_dir`/shards nor in `store`, an fsspec URL, and returns the whole split.

    `mapper` may run its calls on any machine that can read the corpus at the same path, or fetch it. Raises CorpusError
    for text that cannot be read or a store that cannot be used, TrainingError for a full disk. Leaves no partial shard.
    """
    folder = cache_dir.absolute() / "shards"
    tasks = shard_tasks(corpus.within(cache_dir))
    paths = [folder / f"{shard_key(task, tokenizer)}.bin" for task in tasks]
    write = partial(write_shard, tokenizer=tokenizer, folder=folder, store=store)
    for run in (mapper, map):  # the second pass recreates shards that the mapper wrote to another machine's disk
        missing = [
            task
            for task, path in zip(tasks, paths, strict=True)
            if read_shard(path) is None and not (store and fetch_shard(path, store))
        ]
        with doing(f"tokenising {corpus.name}"):
            for done, _ in enumerate((run if len(missing) > 1 else map)(write, missing), start=1):
                at(done, len(missing))
    shards = [read_shard(path) for path in paths]
    if None in shards:
        raise CorpusError(f"token shard {paths[shards.index(None)]} disappeared after it was written; run again")
    filled = tuple(shard for shard in shards if shard and shard.num_tokens)
    if not any(shard.num_bytes for shard in filled):
        raise CorpusError(f"{corpus.name} holds no text: every document in it is empty")
    return TokenSet(
        shards=filled,
        starts=tuple(accumulate((shard.num_tokens for shard in filled[:-1]), initial=0)),
        dtype=WORD if corpus.holds_conversations else token_dtype(tokenizer),
        fingerprint=hashlib.sha256("".join(path.stem for path in paths).encode()).hexdigest(),
        holds_conversations=corpus.holds_conversations,
    )


def shard_tasks(corpus: Corpus) -> list[ShardTask]:
    """Groups the pieces in order into tasks of up to SHARD_BYTES; a bigger piece is a task of its own."""
    groups: list[list[Piece]] = []
    size = SHARD_BYTES
    for piece in corpus.pieces:
        if size + piece.num_bytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.num_bytes
    closes = [not before[-1].continues_in(after[0]) for before, after in pairwise(groups)] + [True]
    return [ShardTask(tuple(group), opens=n == 0, closes=closes[n]) for n, group in enumerate(groups)]


def token_dtype(tokenizer: Tokenizer) -> str:
    """The smallest little-endian type that holds every id."""
    return "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"


def shard_key(task: ShardTask, tokenizer: Tokenizer) -> str:
    """A hash of everything that determines the shard's content."""
    parts = [SHARD_FORMAT, tokenizer.fingerprint, task.opens, task.closes, [piece.identity for piece in task.pieces]]
    parts += [CONVERSATION_FORMAT, template_source(tokenizer)] if task.holds_conversations else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def read_shard(path: Path) -> Shard | None:
    """The shard at `path`, or None if it is missing, truncated or changed.

    Its content is read only if the file's time is not the one that was written down, so a second run starts at once.
    """
    try:
        meta = json.loads(path.with_suffix(".json").read_text())
        found = path.stat()
        size, checksum, modified = meta.pop("file_size"), meta.pop("crc32", None), meta.pop("modified_ns", None)
        written = checksum is None or modified == found.st_mtime_ns  # earlier versions wrote no checksum
        if found.st_size != size or not (written or crc32(path) == checksum):
            return None
        return Shard(path=str(path), modified_ns=found.st_mtime_ns, **meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def crc32(path: Path) -> int:
    """A checksum of the file's content, at about a gigabyte per second."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def write_shard(task: ShardTask, tokenizer: Tokenizer, folder: Path, store: str | None = None) -> None:
    """Tokenises one task into `folder` and `store`. The .json is written last and marks the shard as complete."""
    path = folder / f"{shard_key(task, tokenizer)}.bin"
    with written_whole(path) as file:
        write = write_conversations if task.holds_conversations else write_text
        counts = write(task, tokenizer, file)
        size = file.tell()
    meta = counts | {"file_size": size, "crc32": crc32(path), "modified_ns": path.stat().st_mtime_ns}
    write_json(path.with_suffix(".json"), meta)
    if store:
        with store_used(store) as (fs, there):
            for part in (path, path.with_suffix(".json")):
                fs.put_file(str(part), f"{there}/{part.name}")


def write_text(task: ShardTask, tokenizer: Tokenizer, file: IO[bytes]) -> dict[str, int]:
    """Writes the ids of the task's documents; returns the counts of a Shard."""
    dtype = token_dtype(tokenizer)
    begin = np.array(tokenizer.encode_prompt(""), dtype=dtype).tobytes()
    between = np.array([tokenizer.eot, *tokenizer.bos], dtype=dtype).tobytes()
    num_bytes = num_documents = 0
    if task.opens:
        file.write(begin)
    for text, closes in documents(task):
        for number, block in enumerate(blocks(text) if tokenizer.splits_lines else (text,)):
            file.write(token_ids(tokenizer, block, number == 0, dtype).tobytes())
        num_bytes += len(text.encode())
        num_documents += closes
        file.write(between if closes else b"")
    num_tokens = file.tell() // np.dtype(dtype).itemsize
    return {"num_tokens": num_tokens, "num_bytes": num_bytes, "num_documents": num_documents}


def token_ids(tokenizer: Tokenizer, text: str, begins: bool, dtype: str) -> np.ndarray:
    """`tokenizer.encode` (n,), from ours without a Python object for each token."""
    if isinstance(tokenizer.encoding, tiktoken.Encoding):
        with contextlib.suppress(UnicodeEncodeError):  # half a character, which `encode` replaces
            parts = [tokenizer.encoding.encode_to_numpy(part, disallowed_special=()) for part in cut_long_space(text)]
            return np.concatenate(parts).astype(dtype)
    return np.array(tokenizer.encode(text, begins), dtype=dtype)


def write_conversations(task: ShardTask, tokenizer: Tokenizer, file: IO[bytes]) -> dict[str, int]:
    """Writes the words of the task's conversations; returns the counts of a Shard."""
    words = ConversationWords(tokenizer)
    for piece in task.pieces:
        for number, text in piece.numbered():
            if text:
                file.write(words.of(messages_of(text), partial(piece.place, number)))
    return words.counts


def fetch_shard(path: Path, store: str) -> bool:
    """Copies the shard from `store` to `path`; returns False if the store does not have it."""
    with store_used(store) as (fs, there):
        for part in (path, path.with_suffix(".json")):
            try:
                with fs.open(f"{there}/{part.name}", "rb") as source, written_whole(part) as copy:
                    shutil.copyfileobj(source, copy)
            except FileNotFoundError:
                return False
    if read_shard(path) is None:
        return False
    with contextlib.suppress(OSError, KeyError):  # with the time that is written down, no start reads it again
        written = json.loads(path.with_suffix(".json").read_text())["modified_ns"]
        os.utime(path, ns=(written, written))
    return True


@contextlib.contextmanager
def store_used(store: str) -> Iterator[tuple[Any, str]]:
    """The file system of `store` and its folder of shards; turns any error of its client into a CorpusError."""
    fs, root = file_system(store)
    try:
        yield fs, f"{root}/shards"
    except FoundryError:
        raise
    except Exception as error:  # each client has its own types for no network, no key, no such bucket
        raise CorpusError(f"token shards cannot be stored at {store}: {error or type(error).__name__}") from error


def documents(task: ShardTask) -> Iterator[tuple[str, bool]]:
    """The task's texts in order, each with whether it ends its document."""
    for piece, after in zip(task.pieces, [*task.pieces[1:], None], strict=True):
        closes = task.closes if after is None else not piece.continues_in(after)
        yield from ((text, closes or ends) for text, ends in piece.parts())


def blocks(text: str) -> Iterator[str]:
    """Splits a long text where a line ends in a visible character and the next begins with one.

    A tokenizer that `splits_lines` always separates tokens there, so the blocks' tokens equal the whole text's.
    """
    start = 0
    border = re.compile(r"(?<=\S)\n(?=\S)")
    while len(text) - start > BLOCK_CHARS:
        cut = border.search(text, start + BLOCK_CHARS)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]
