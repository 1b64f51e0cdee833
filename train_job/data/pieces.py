"""Pieces of text: each is a range of one source, small enough to be tokenised as one of many tasks.

Each kind of source (plain text, what `records` reads, the built-in text) has three operations: `scan` cuts a file into
pieces, a reader yields a piece's documents, and `cut_piece` splits a piece in two. No file is held in memory.
"""

import codecs
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise, takewhile
from pathlib import Path

from gptcore.errors import CorpusError
from gptcore.files import sha256
from train_job.data import parquet, records, tasks
from train_job.data.conversations import CONVERSATION
from train_job.data.fetch import Origin, fetch
from train_job.data.formats import wrong_text

PIECE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Piece:
    """A range of one source: bytes [start, end) of a file or of the built-in text, or rows of Parquet.

    `digest` is the whole source's SHA-256, so (digest, kind, start, end, column) identifies the text independently of
    its path. `num_bytes` is its size as the split counts it: bytes, for Parquet those of the text column only. If the
    source is a copy, `origin` is its source; `name` is the name in messages. A document ends at the string `separator`,
    if there is one. The records with the numbers in `left_out`, from 0, are not read.
    """

    path: str
    kind: str  # "text" | "jsonl" | "json" | "csv" | "tsv" | "parquet" | "literal"
    start: int
    end: int
    column: str
    digest: str
    num_bytes: int
    origin: Origin | None = None
    name: str = ""
    separator: str = ""
    left_out: tuple[int, ...] = ()

    @property
    def identity(self) -> tuple[str | int, ...]:
        """What determines the piece's documents."""
        text = self.digest, self.kind, self.start, self.end, self.column
        return (*text, self.separator, *self.left_out) if self.separator or self.left_out else text

    @property
    def label(self) -> str:
        """The source's name in messages."""
        return self.origin.url if self.origin else self.name or self.path

    def texts(self) -> Iterator[str]:
        """The source's records in order; for a text file, the piece's part of the file.

        A copy that this machine lacks is fetched. Raises CorpusError for a line or row that is not text.
        """
        if self.origin:
            fetch(self.origin, Path(self.path), self.digest)
        try:
            yield from READERS[self.kind](self)
        except OSError as error:
            raise CorpusError(f"cannot read {self.label}: {error.strerror or error}") from error

    def numbered(self) -> Iterator[tuple[int, str]]:
        """`texts` with the number of each record, from 0, without those left out."""
        left_out = frozenset(self.left_out)
        return ((number, text) for number, text in enumerate(self.texts()) if number not in left_out)

    def place(self, number: int) -> str:
        """Where a record is, for messages."""
        if self.kind == "jsonl":
            return f"{self.label}, line {records.line_number(self.path, self.start) + number}"
        return (
            f"{self.label}, row {self.start + number}"
            if self.kind == "parquet"
            else f"{self.label}, record {number} from byte {self.start}"
        )

    def parts(self) -> Iterator[tuple[str, bool]]:
        """The piece's documents in order, without empty ones, each with whether it ends here.

        Only the last document of a piece of a text file may continue in the next piece.
        """
        for _, text in self.numbered():
            *ended, last = text.split(self.separator) if self.separator else [text]
            yield from ((document, True) for document in ended if document)
            if last:
                yield last, self.kind != "text"

    def documents(self) -> Iterator[str]:
        """The texts of `parts`."""
        return (text for text, _ in self.parts())

    def continues_in(self, other: "Piece") -> bool:
        """Whether this piece's last document continues in `other`."""
        return self.kind == other.kind == "text" and (self.path, self.end) == (other.path, other.start)


@dataclass(frozen=True)
class Scan:
    """The result of one pass over a file: its SHA-256, the borders of its pieces, and the bytes that each counts."""

    digest: str
    borders: list[int]
    sizes: list[int]


def scan(path: Path, kind: str, column: str = "", separator: str = "", label: str = "") -> Scan:
    """Reads a file once, some kinds twice. Raises CorpusError, with the position, if it is malformed."""
    label = label or str(path)
    if kind == "parquet":
        borders, sizes = parquet.scan_parquet(path, column, label, PIECE_BYTES)
        return Scan(sha256(path), borders, sizes)
    found = scan_text(path, "jsonl" if kind == "jsonl" else "text", separator if kind == "text" else "", label)
    start = found.borders[0]
    if kind == "json":
        borders = records.scan_json(path, start, column, label, PIECE_BYTES)
    elif kind in ("csv", "tsv"):
        borders = records.scan_csv(path, start, kind, column, label, PIECE_BYTES)
    else:
        return found
    return Scan(found.digest, borders, [end - start for start, end in pairwise(borders)])


def scan_text(path: Path, kind: str, separator: str, label: str) -> Scan:
    """Reads a text or jsonl file once. Raises CorpusError naming the first byte that is not UTF-8 text."""
    hasher, borders, rest = hashlib.sha256(), [0], b""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while data := file.read(PIECE_BYTES - len(rest) % PIECE_BYTES):
            hasher.update(data)
            if 0 in data:
                at = file.tell() - len(data) + data.index(0)
                raise wrong_text(
                    path.name,
                    f"{label} is binary, not text: byte {at} is NUL. Convert it to UTF-8 or leave it out",
                    "binary",
                )
            if borders == [0] and not rest and kind == "text" and data.startswith(codecs.BOM_UTF8):
                borders, data = [len(codecs.BOM_UTF8)], data[len(codecs.BOM_UTF8) :]  # a byte order mark is not text
            block = rest + data
            cut = last_border(block, kind, separator) if file.tell() < size else len(block)
            decode(block[:cut], label, borders[-1], path.name)
            borders += [borders[-1] + cut] if cut else []
            rest = block[cut:]
    return Scan(hasher.hexdigest(), borders, [end - start for start, end in pairwise(borders)])


def last_border(block: bytes, kind: str, separator: str = "") -> int:
    """Where to end a piece that begins with `block`: after its last line; 0 if the block has no such place.

    A line of text should end in a visible character and the next begin with one: GPT-2's split pattern always separates
    tokens there, so the pieces' tokens equal the whole text's. A piece preferably ends after a separator, and never
    inside one or just before it.
    """
    if separator:
        ended = len(block) - len(
            block.split(separator.encode())[-1]
        )  # finds separators from the left, as the text's split does
        if ended:
            return ended
        block = block[: -len(separator.encode())]
        if not block:
            return 0
    newline = block.rfind(b"\n") + 1
    if kind == "jsonl":
        return newline
    clean = [match.end() for match in re.finditer(rb"(?<=\S)\n(?=\S)", block[-(2**20) :])]
    if clean:
        return max(len(block) - 2**20, 0) + clean[-1]
    return newline or character_border(block, len(block) - 1)


def character_border(data: bytes, position: int) -> int:
    """The start of the UTF-8 character that contains byte `position`."""
    back = next((n for n in range(4) if data[position - n] & 0xC0 != 0x80), 0)
    return position - back


def decode(data: bytes, label: str, offset: int, name: str) -> str:
    """Decodes bytes from `offset` of the file. Raises CorpusError naming the first wrong byte."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise wrong_text(
            name,
            f"{label} is not UTF-8 text: byte {offset + error.start} is 0x{data[error.start]:02x}. "
            "Convert it to UTF-8 or leave it out",
            "not UTF-8 text",
        ) from None


def read_text(piece: Piece) -> Iterator[str]:
    data = read_bytes(piece.path, piece.start, piece.end)
    yield decode(data, piece.label, piece.start, Path(piece.path).name)


def read_bytes(path: str, start: int, end: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(end - start)
    if len(data) < end - start:
        raise CorpusError(f"{path} has been truncated since it was opened; run again")
    return data


@cache
def builtin_documents() -> list[str]:
    """Python's language reference from this interpreter: a document per topic, without repeated paragraphs."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        paragraphs = [text for text in dict.fromkeys(topics[name].split("\n\n")) if text not in seen]
        seen.update(paragraphs)
        documents.append("\n\n".join(paragraphs))
    return documents


@cache
def builtin_conversations() -> list[str]:
    """The built-in conversations, each as JSON."""
    return [json.dumps(messages) for messages in tasks.conversations()]


BUILTIN: dict[str, tuple[Callable[[], list[str]], str]] = {
    "builtin": (builtin_documents, ""),
    "builtin-chat": (builtin_conversations, CONVERSATION),
}
"""What makes the documents of each built-in corpus, and their column."""


def builtin_piece(name: str) -> Piece:
    """The whole of a built-in corpus."""
    documents, column = BUILTIN[name]
    data = "".join(documents()).encode()
    return Piece(name, "literal", 0, len(data), column, hashlib.sha256(data).hexdigest(), len(data))


def read_literal(piece: Piece) -> Iterator[str]:
    first = 0  # first byte of the current document
    for document in BUILTIN[piece.path][0]():
        data = document.encode()
        yield data[max(piece.start - first, 0) : max(piece.end - first, 0)].decode()
        first += len(data)


def read_records(piece: Piece) -> Iterator[str]:
    read = {"jsonl": records.read_jsonl, "json": records.read_json, "parquet": parquet.read_parquet}[piece.kind]
    return read(piece.path, piece.start, piece.end, piece.column, piece.label)


def read_csv(piece: Piece) -> Iterator[str]:
    return records.read_csv(piece.path, piece.start, piece.end, piece.kind, piece.column, piece.label)


READERS: dict[str, Callable[[Piece], Iterator[str]]] = {
    "text": read_text,
    "jsonl": read_records,
    "json": read_records,
    "csv": read_csv,
    "tsv": read_csv,
    "parquet": read_records,
    "literal": read_literal,
}


def cut_piece(piece: Piece, offset: int) -> tuple[Piece, Piece]:
    """Splits the piece at its byte `offset`, moved back to a border."""
    if offset in (0, piece.num_bytes):
        border, size = (piece.end, offset) if offset else (piece.start, 0)
    elif piece.kind == "parquet":
        file = parquet.open_parquet(piece.path, piece.column, piece.label)
        lengths = parquet.row_bytes(file, piece.column, list(range(file.num_row_groups)), piece.label)
        ends = list(accumulate(lengths[piece.start : piece.end]))
        rows = bisect_right(ends, offset)
        border, size = piece.start + rows, ends[rows - 1] if rows else 0
    else:
        border = byte_border(piece, offset)
        size = border - piece.start
    left = replace(piece, end=border, num_bytes=size)
    return left, replace(piece, start=border, num_bytes=piece.num_bytes - size)


def byte_border(piece: Piece, offset: int) -> int:
    """The first byte of the record or character that contains the piece's byte `offset`."""
    start, end = piece.start, piece.start + offset
    if piece.kind in ("json", "csv", "tsv"):
        starts = records.record_starts(piece.path, start, piece.kind, piece.column, piece.label)
        return max((byte for byte in takewhile(lambda byte: byte <= end, starts)), default=start)
    if piece.column == CONVERSATION and piece.kind == "literal":
        ends = accumulate(len(document.encode()) for document in BUILTIN[piece.path][0]())
        return max((byte for byte in ends if byte <= end), default=start)
    whole = piece.kind == "literal"
    data = b"".join(map(str.encode, read_literal(piece))) if whole else read_bytes(piece.path, start, piece.end)
    if piece.kind == "jsonl":
        return start + data.rfind(b"\n", 0, offset) + 1
    border, mark = character_border(data, offset), piece.separator.encode()
    if mark:
        near = data[: border + len(mark) - 1]
        ended = len(near) - len(near.split(mark)[-1])
        border = ended - len(mark) if ended > border else border  # inside a separator: it goes to the right part
    return start + border
