"""A piece of text: a stretch of one source, small enough to tokenise as one task of many.

Each kind of source (plain text, JSON lines, Parquet, the built-in text) has three skills here: `scan_…` cuts a file
into pieces, `read_…` gives a piece's documents, `cut_piece` parts a piece in two. Pieces come in and documents go
out; nothing of a file stays in memory.
"""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

from gptcore.errors import CorpusError, did_you_mean
from train_job.files import sha256
from train_job.remote import Origin, fetch

PIECE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Piece:
    """A stretch of one source: bytes [start, end) of a text, of JSON lines or of a built-in text, rows of Parquet.

    `digest` is the whole source's SHA-256, so (digest, kind, start, end, column) says which text this is wherever
    it lies. `num_bytes` is its size as the split counts it: bytes, for Parquet those of the text column alone. If the
    source is a copy, `origin` says of what.
    """

    path: str
    kind: str  # "text" | "jsonl" | "parquet" | "literal"
    start: int
    end: int
    column: str
    digest: str
    num_bytes: int
    origin: Origin | None = None

    @property
    def identity(self) -> tuple[str, str, int, int, str]:
        """What decides the piece's text."""
        return self.digest, self.kind, self.start, self.end, self.column

    def documents(self) -> Iterator[str]:
        """The piece's documents in order, empty ones left out; of a text file, its part of the one document.

        A copy that this machine lacks is fetched. Raises CorpusError for a line or row that is not text.
        """
        if self.origin:
            fetch(self.origin, Path(self.path), self.digest)
        try:
            yield from (text for text in READERS[self.kind](self) if text)
        except OSError as error:
            raise CorpusError(f"cannot read {self.path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:  # Parquet's writers may put any bytes into a text column
            raise CorpusError(f"{self.path}: column {self.column!r} has a row that is not UTF-8: {error}") from None

    def continues_in(self, other: "Piece") -> bool:
        """Whether `other` goes on with the document that this piece ends with."""
        return self.kind == other.kind == "text" and (self.path, self.end) == (other.path, other.start)


@dataclass(frozen=True)
class Scan:
    """What one pass over a file found: its SHA-256, where its pieces begin and end, how many bytes each counts."""

    digest: str
    borders: list[int]
    sizes: list[int]


def scan_text(path: Path, kind: str) -> Scan:
    """Reads a text or jsonl file once. Raises CorpusError naming the first byte that is not UTF-8 text."""
    hasher, borders, rest = hashlib.sha256(), [0], b""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while data := file.read(PIECE_BYTES - len(rest) % PIECE_BYTES):
            hasher.update(data)
            if 0 in data:
                at = file.tell() - len(data) + data.index(0)
                raise CorpusError(f"{path} is binary, not text: byte {at} is NUL. Convert it to UTF-8 or leave it out")
            block = rest + data
            cut = last_border(block, kind) if file.tell() < size else len(block)
            decode(block[:cut], path, borders[-1])
            borders += [borders[-1] + cut] if cut else []
            rest = block[cut:]
    return Scan(hasher.hexdigest(), borders, [end - start for start, end in pairwise(borders)])


def last_border(block: bytes, kind: str) -> int:
    """Where to end a piece that begins with `block`: behind its last line; 0 if that is not in sight.

    A text's line should end in a visible character and the next begin with one: GPT-2's split pattern always parts
    its tokens there, so pieces have the tokens of the whole.
    """
    newline = block.rfind(b"\n") + 1
    if kind == "jsonl":
        return newline
    clean = [match.end() for match in re.finditer(rb"(?<=\S)\n(?=\S)", block[-(2**20) :])]
    if clean:
        return max(len(block) - 2**20, 0) + clean[-1]
    return newline or character_border(block, len(block) - 1)


def character_border(data: bytes, position: int) -> int:
    """The start of the UTF-8 character that byte `position` belongs to."""
    back = next((n for n in range(4) if data[position - n] & 0xC0 != 0x80), 0)
    return position - back


def decode(data: bytes, path: Path | str, offset: int) -> str:
    """Text from bytes found at `offset` of the file. Raises CorpusError naming the first wrong byte."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8 text: byte {offset + error.start} is 0x{data[error.start]:02x}. "
            "Convert it to UTF-8 or leave it out"
        ) from None


def read_text(piece: Piece) -> Iterator[str]:
    yield decode(read_bytes(piece.path, piece.start, piece.end), piece.path, piece.start)


def read_bytes(path: str, start: int, end: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(end - start)
    if len(data) < end - start:
        raise CorpusError(f"{path} has become shorter since it was opened; run again")
    return data


def read_jsonl(piece: Piece) -> Iterator[str]:
    position = piece.start
    with open(piece.path, "rb") as file:
        file.seek(position)
        for line in file:
            if position >= piece.end:
                return
            try:
                yield text_field(line, piece.column)
            except ValueError as error:
                raise CorpusError(f"{piece.path}, line {line_number(piece.path, position)}: {error}") from None
            position += len(line)


def line_number(path: str, position: int) -> int:
    """Which line, from 1, begins at byte `position`."""
    with open(path, "rb") as file:
        chunks = iter(lambda: file.read(min(2**20, position - file.tell())), b"")
        return 1 + sum(chunk.count(b"\n") for chunk in chunks)


def text_field(line: bytes, column: str) -> str:
    """The field `column` of a line of JSON; an empty line and null are empty text. Raises ValueError."""
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with a field {column!r}, found {type(record).__name__}")
    if column not in record:
        raise ValueError(f"no field {column!r}; there are {', '.join(record) or 'none'}.{did_you_mean(column, record)}")
    text = record[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"field {column!r} is {type(text).__name__}, expected text")
    text.encode()  # half of a surrogate pair is a ValueError here, and no text
    return text


def open_parquet(path: str | Path, column: str) -> Any:
    """The file as a pyarrow ParquetFile with a text column of that name. Raises CorpusError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise CorpusError(f"reading {path} needs pyarrow, which is not installed: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"{path} is not a whole Parquet file: {error}") from None
    names = file.schema_arrow.names
    if column not in names:
        raise CorpusError(f"{path} has no column {column!r}; it has {', '.join(names)}.{did_you_mean(column, names)}")
    kind = file.schema_arrow.field(column).type
    if not any(word in str(kind) for word in ("string", "utf8")) or pyarrow.types.is_nested(kind):
        raise CorpusError(f"{path}: column {column!r} holds {kind}, expected text")
    return file


def scan_parquet(path: Path, column: str) -> Scan:
    """Reads a Parquet file's text column once, for the sizes of its row groups; pieces are whole row groups."""
    file = open_parquet(path, column)
    borders, sizes = [0], [0]
    for group in range(file.num_row_groups):
        lengths = row_bytes(file, column, [group])
        if sizes[-1] and sizes[-1] + sum(lengths) > PIECE_BYTES:
            borders.append(borders[-1])
            sizes.append(0)
        sizes[-1] += sum(lengths)
        borders[-1] += len(lengths)
    return Scan(sha256(path), [0, *borders], sizes)


def row_bytes(file: Any, column: str, groups: list[int]) -> list[int]:
    """UTF-8 bytes of each row's text; null has none."""
    import pyarrow
    from pyarrow import compute

    texts = file.read_row_groups(groups, columns=[column]).column(0).cast(pyarrow.large_string())
    return compute.fill_null(compute.binary_length(texts), 0).to_pylist()


def read_parquet(piece: Piece) -> Iterator[str]:
    file = open_parquet(piece.path, piece.column)
    first = 0  # row of the group at hand
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if first < piece.end and first + rows > piece.start:
            batches = file.iter_batches(batch_size=1024, row_groups=[group], columns=[piece.column])
            texts = (text.as_py() or "" for batch in batches for text in batch.column(0))
            yield from islice(texts, max(piece.start - first, 0), piece.end - first)
        first += rows


def builtin_documents() -> list[str]:
    """Python's language reference as this interpreter carries it, a document per topic, a paragraph said once."""
    from pydoc_data.topics import topics

    told: set[str] = set()
    documents = []
    for name in sorted(topics):
        paragraphs = [text for text in dict.fromkeys(topics[name].split("\n\n")) if text not in told]
        told.update(paragraphs)
        documents.append("\n\n".join(paragraphs))
    return documents


def builtin_bytes() -> bytes:
    return "".join(builtin_documents()).encode()


def builtin_piece() -> Piece:
    """The whole built-in text."""
    data = builtin_bytes()
    return Piece("builtin", "literal", 0, len(data), "", hashlib.sha256(data).hexdigest(), len(data))


def read_literal(piece: Piece) -> Iterator[str]:
    first = 0  # byte of the document at hand
    for document in builtin_documents():
        data = document.encode()
        yield data[max(piece.start - first, 0) : max(piece.end - first, 0)].decode()
        first += len(data)


READERS: dict[str, Callable[[Piece], Iterator[str]]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "literal": read_literal,
}


def cut_piece(piece: Piece, offset: int) -> tuple[Piece, Piece]:
    """The piece's first `offset` bytes, as it counts them, less what goes back to a border; and the rest."""
    if offset in (0, piece.num_bytes):
        border, size = (piece.end, offset) if offset else (piece.start, 0)
    elif piece.kind == "parquet":
        file = open_parquet(piece.path, piece.column)
        ends = list(
            accumulate(row_bytes(file, piece.column, list(range(file.num_row_groups)))[piece.start : piece.end])
        )
        rows = bisect_right(ends, offset)
        border, size = piece.start + rows, ends[rows - 1] if rows else 0
    else:
        data = (
            builtin_bytes()[piece.start : piece.end]
            if piece.kind == "literal"
            else read_bytes(piece.path, piece.start, piece.end)
        )
        size = data.rfind(b"\n", 0, offset) + 1 if piece.kind == "jsonl" else character_border(data, offset)
        border = piece.start + size
    left = replace(piece, end=border, num_bytes=size)
    return left, replace(piece, start=border, num_bytes=piece.num_bytes - size)
