"""Where text comes from: what the user named goes in, an ordered list of pieces of text comes out.

A corpus is built in, a known download, or a file, a folder or a glob, here or behind a URL; its files are plain text,
JSON lines or Parquet, each of them possibly gzipped. Opening one reads every file once, in pieces: it is hashed,
checked to be text, and cut into pieces small enough to tokenise in parallel. What was learned about a big file is kept
in the cache. No text is held: a corpus is places, and a 10 GB file costs no more memory than a small one.
"""

import glob
import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from gptcore.errors import ConfigError, CorpusError, did_you_mean
from gptcore.home import expanded
from train_job.files import copy_name, download, sha256, written_whole
from train_job.pieces import PIECE_BYTES, Piece, Scan, builtin_piece, cut_piece, scan_parquet, scan_text
from train_job.remote import Origin, copies, in_store, listed

MEMO_BYTES = 8 * 2**20
"""Files from this size on are scanned once and remembered; scanning a smaller one is as quick as remembering it."""
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
NAMED = ("builtin", "shakespeare")
WEB = ("http://", "https://")


@dataclass(frozen=True)
class Corpus:
    """Text as an ordered tuple of pieces; `origins` are the objects that a URL led to."""

    name: str
    pieces: tuple[Piece, ...]
    origins: tuple[Origin, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what decides the text: equal fingerprints mean the same documents in the same order."""
        return hashlib.sha256(json.dumps([piece.identity for piece in self.pieces]).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Size as the split counts it; the text's exact UTF-8 length is the TokenSet's."""
        return sum(piece.num_bytes for piece in self.pieces)

    def documents(self) -> Iterator[str]:
        """Every document in order; a big text file comes in its pieces."""
        for piece in self.pieces:
            yield from piece.documents()

    def within(self, cache_dir: Path) -> "Corpus":
        """The same text for a machine that has its cache there: copies are looked for, and fetched, in it."""
        root = cache_dir.absolute()
        moved = (
            replace(piece, path=str(root.joinpath(*Path(piece.path).parts[-2:]))) if piece.origin else piece
            for piece in self.pieces
        )
        return replace(self, pieces=tuple(moved))


def open_corpus(
    data: str,
    text_column: str = "text",
    cache_dir: Path = Path(".cache"),
    refresh: bool = True,
    begun: Sequence[Origin] = (),
) -> Corpus:
    """The corpus that `data` names: builtin, shakespeare, or a file, folder or glob, here or behind a URL.

    Without `refresh`, a web page that was downloaded before is taken as it was then, whatever is there now. `begun` are
    the objects, in their states, to take from a store instead of those that it has now. Raises CorpusError if there is
    no text, or if it is empty or not text.
    """
    if not data:
        raise CorpusError(f"no corpus was named; expected {', '.join(NAMED)}, a path, a glob or a URL")
    if data == "builtin":
        return Corpus(data, (builtin_piece(),))
    objects: Sequence[Origin] = ()
    try:
        if in_store(data):
            objects = begun or listed(data)
        paths = copies(objects, cache_dir) if objects else locate(data, cache_dir, refresh)
        origins: Sequence[Origin | None] = objects or [Origin(data) if data.startswith(WEB) else None] * len(paths)
        pieces = [
            replace(piece, origin=origin)
            for path, origin in zip(paths, origins, strict=True)
            for piece in open_file(path, text_column, cache_dir)
        ]
    except OSError as error:
        raise CorpusError(f"cannot read {error.filename or data}: {error.strerror or error}") from error
    if not pieces:
        raise CorpusError(f"{data} holds no text: every file in it is empty")
    return Corpus(data, tuple(pieces), tuple(objects))


def locate(data: str, cache_dir: Path, refresh: bool = True) -> list[Path]:
    """The files behind `data`, in order; downloads what is not there yet or, with `refresh`, has changed."""
    if data == "shakespeare":
        return [shakespeare(cache_dir)]
    if data.startswith(WEB):
        name = Path(urlsplit(data).path).name or "index"
        copy = cache_dir.absolute() / "downloads" / copy_name(data, name)
        return [download(data, copy, refresh)]
    path = expanded(data.removeprefix("file://"), CorpusError)
    if path.is_file():
        return [path.absolute()]
    if path.is_dir():
        inside = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
        visible = sorted(name for name in inside if not any(part.startswith(".") for part in name.parts))
        if not visible:
            raise CorpusError(f"the folder {data} holds no files")
        return [(path / name).absolute() for name in visible]
    if glob.has_magic(data):
        files = sorted(Path(name).absolute() for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if not files:
            raise CorpusError(f"no file matches {data!r}")
        return files
    if path.exists():
        raise CorpusError(f"{data} is neither a file nor a folder")
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    raise CorpusError(
        f"there is no file, folder or corpus called {data!r}; a corpus is {', '.join(NAMED)}, a path, a glob or a URL."
        + did_you_mean(path.name, [*NAMED, *siblings])
    )


def shakespeare(cache_dir: Path) -> Path:
    """Tiny Shakespeare (Karpathy 2015): from the folder $GPT_FOUNDRY_DATA, the cache, or the network."""
    folder = os.environ.get("GPT_FOUNDRY_DATA")
    path = Path(folder or "").absolute() / "tinyshakespeare.txt"
    if not (folder and path.is_file()):
        path = cache_dir.absolute() / "downloads" / "tinyshakespeare.txt"
        try:
            download(SHAKESPEARE_URL, path)
        except CorpusError as error:
            raise CorpusError(
                f"{error}; offline, set GPT_FOUNDRY_DATA to a folder that holds tinyshakespeare.txt, or use builtin"
            ) from error
    found = sha256(path)
    if found != SHAKESPEARE_SHA256:
        raise CorpusError(
            f"{path} is not tiny Shakespeare: its SHA-256 is {found}, expected {SHAKESPEARE_SHA256}; remove it"
        )
    return path


def open_file(path: Path, column: str, cache_dir: Path) -> list[Piece]:
    """The pieces of one file; none if it is empty. Raises CorpusError if it is not what its name says."""
    if path.suffix == ".gz":
        path = unpacked(path, cache_dir)
    kind = SUFFIXES.get(path.suffix, "text")
    column = "" if kind == "text" else column
    scan = remembered_scan(path, kind, column, cache_dir)
    pieces = [
        Piece(str(path), kind, start, end, column, scan.digest, size)
        for start, end, size in zip(scan.borders, scan.borders[1:], scan.sizes, strict=False)
        if size
    ]
    if kind == "jsonl" and pieces:
        next(pieces[0].documents(), None)  # a wrong column or format shows at once, not in mid-work
    return pieces


def unpacked(path: Path, cache_dir: Path) -> Path:
    """The gzipped file's content as a file in the cache. Raises CorpusError."""
    target = cache_dir.absolute() / "unpacked" / f"{stamp(path)}-{path.stem}"
    if not target.exists():
        try:
            with gzip.open(path) as packed, written_whole(target) as file:
                shutil.copyfileobj(packed, file)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise CorpusError(f"{path} is not a whole gzip file: {error}") from error
    return target


def remembered_scan(path: Path, kind: str, column: str, cache_dir: Path) -> Scan:
    """Scans the file, or recalls the scan of a big file that has not changed since."""
    big = path.stat().st_size >= MEMO_BYTES
    memo = cache_dir.absolute() / "scans" / f"{stamp(path, kind, column, PIECE_BYTES)}.json"
    if big and memo.exists():
        return Scan(**json.loads(memo.read_text()))
    scan = scan_parquet(path, column) if kind == "parquet" else scan_text(path, kind)
    if big:
        with written_whole(memo) as file:
            file.write(json.dumps(asdict(scan)).encode())
    return scan


def stamp(path: Path, *more: str | int) -> str:
    """A name for what was learned about a file: it changes with the file's path, size and time of change."""
    status = path.stat()
    facts = [str(path), status.st_size, status.st_mtime_ns, *more]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def split(corpus: Corpus, val_fraction: float) -> tuple[Corpus, Corpus]:
    """Training and validation split; the second is the last `val_fraction` of the bytes.

    The cut goes back to the start of the character (text), line (jsonl) or row (Parquet) it falls into. Raises
    ConfigError for a fraction outside (0, 1), CorpusError if one side would have no text.
    """
    if not 0 < val_fraction < 1:
        raise ConfigError(f"val_fraction is {val_fraction}; expected more than 0 and less than 1")
    cut = int((1 - val_fraction) * corpus.num_bytes)
    train: list[Piece] = []
    val: list[Piece] = []
    seen = 0
    for piece in corpus.pieces:
        left, right = cut_piece(piece, min(max(cut - seen, 0), piece.num_bytes))
        train += [left] if left.num_bytes else []
        val += [right] if right.num_bytes else []
        seen += piece.num_bytes
    if not train or not val:
        raise CorpusError(
            f"{corpus.name} is too small: {corpus.num_bytes} bytes cannot be parted to hold back "
            f"{val_fraction:.0%} for validation"
        )
    return replace(corpus, pieces=tuple(train)), replace(corpus, pieces=tuple(val))
