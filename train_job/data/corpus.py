"""Opens a corpus: the user's `data` setting goes in, an ordered list of pieces of text comes out.

A corpus is built in, a known download, or a file, a folder or a glob, local or at a URL; `formats` detects what a file
contains. Opening a corpus reads every file once: it is hashed, checked to be text, and cut into pieces small enough to
tokenise in parallel. The result for a big file is cached. A corpus holds no text, only positions in files, so a 10 GB
file takes no more memory than a small one.
"""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from urllib.parse import urlsplit

from gptcore.errors import ConfigError, CorpusError, did_you_mean
from gptcore.files import sha256
from gptcore.home import expanded
from train_job.data import formats
from train_job.data.conversations import CONVERSATION
from train_job.data.fetch import Origin, copy_name, download, fetch_all, in_store, list_objects
from train_job.data.folders import LeftOut, files_below, files_matching, summarize
from train_job.data.formats import HEAD_BYTES, NotText
from train_job.data.pieces import BUILTIN, PIECE_BYTES, Piece, Scan, builtin_piece, cut_piece, scan
from train_job.files import write_json, written_whole

MEMO_BYTES = 8 * 2**20
"""The scan of a file of this size or more is cached; scanning a smaller one is as fast as reading the cache."""
SCAN_FORMAT = 2
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
NAMED = (*BUILTIN, "shakespeare")
WEB = ("http://", "https://")


@dataclass(frozen=True)
class Corpus:
    """Text as an ordered tuple of pieces; `origins` are the objects at a URL, `left_out` files that are not text."""

    name: str
    pieces: tuple[Piece, ...]
    origins: tuple[Origin, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what determines the text: equal fingerprints mean the same documents in the same order."""
        return hashlib.sha256(json.dumps([piece.identity for piece in self.pieces]).encode()).hexdigest()

    @property
    def holds_conversations(self) -> bool:
        """Whether its documents are conversations, as `train_job.data.conversations` has them."""
        return self.pieces[0].column == CONVERSATION

    @property
    def num_bytes(self) -> int:
        """Size in bytes as the split counts it; the TokenSet has the exact UTF-8 length of the text."""
        return sum(piece.num_bytes for piece in self.pieces)

    def documents(self) -> Iterator[str]:
        """Every document in order; a big text file comes in several pieces."""
        for piece in self.pieces:
            yield from piece.documents()

    def within(self, cache_dir: Path) -> "Corpus":
        """The same corpus with the paths of copies moved to another machine's cache."""
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
    separator: str = "",
) -> Corpus:
    """Opens the corpus `data`: builtin, shakespeare, or a file, folder or glob, local or at a URL.

    Without `refresh`, a web page that was downloaded before is not checked for changes. `begun` are the objects, with
    their states, that a resumed run started with; they are used instead of what the store lists now. A document ends at
    the string `separator`. Among several files, those that are not text are left out. Raises CorpusError if there is no
    text.
    """
    if not data:
        raise CorpusError(f"no corpus given; expected {', '.join(NAMED)}, a path, a glob or a URL")
    if data in BUILTIN:
        return Corpus(data, (builtin_piece(data),))
    objects: Sequence[Origin] = ()
    left: list[LeftOut] = []
    sources: list[tuple[Path, Origin | None]]
    try:
        if in_store(data):
            objects = begun or list_objects(data)
            several = [origin.url for origin in objects] != [data]
            if several and not begun:
                objects, left = textual(objects, data)
            sources = list(zip(fetch_all(objects, cache_dir), objects, strict=True))
        else:
            paths, left, several = locate(data, cache_dir, refresh)
            origin = Origin(data) if data.startswith(WEB) else None
            sources = [(path, origin) for path in paths]
        opened = partial(open_file, column=text_column, separator=separator, cache_dir=cache_dir)
        pieces: list[Piece] = []
        for path, origin in sources:
            try:
                found = opened(path, origin)
            except NotText as problem:
                if not several:
                    raise
                left.append(LeftOut(shown_name(path, origin, data), problem.what))
                continue
            if not found and several:
                why = "no text in it" if path.stat().st_size else "empty"
                left.append(LeftOut(shown_name(path, origin, data), why))
            pieces += found
    except OSError as error:
        raise CorpusError(f"cannot read {error.filename or data}: {error.strerror or error}") from error
    if not pieces:
        empty = "every document in it is empty" if any(path.stat().st_size for path, _ in sources) else "it is empty"
        raise CorpusError(f"{data} holds no text: {f'left out are {summarize(left)}' if left else empty}")
    return Corpus(data, tuple(pieces), tuple(objects), tuple(left))


def textual(objects: Sequence[Origin], data: str) -> tuple[list[Origin], list[LeftOut]]:
    """Separates objects that may be text from those whose names say they are not, which need not be fetched."""
    found = [(origin, formats.known_by_name(origin.url)) for origin in objects]
    root = f"{data.rstrip('/')}/"
    left = [LeftOut(origin.url.removeprefix(root), what) for origin, what in found if what]
    return [origin for origin, what in found if not what], left


def shown_name(path: Path, origin: Origin | None, data: str) -> str:
    """A file's name in a list: its path relative to `data`, or else its whole path."""
    whole, root = origin.url if origin else str(path), data if origin else str(Path(data).expanduser().absolute())
    return whole.removeprefix(f"{root.rstrip('/')}/")


def locate(data: str, cache_dir: Path, refresh: bool = True) -> tuple[list[Path], list[LeftOut], bool]:
    """The files that `data` names, what is left out, and whether `data` is a folder or glob.

    Downloads what is missing or, with `refresh`, has changed.
    """
    if data == "shakespeare":
        return [shakespeare(cache_dir)], [], False
    if data.startswith(WEB):
        try:
            name = Path(urlsplit(data).path).name or "index"
        except ValueError as error:
            raise CorpusError(f"{data!r} is not a URL: {error}") from None
        copy = cache_dir.absolute() / "downloads" / copy_name(data, name)
        return [download(data, copy, refresh)], [], False
    path = expanded(data.removeprefix("file://"), CorpusError)
    if path.is_file():
        return [path.absolute()], [], False
    if path.is_dir():
        files, left = files_below(path)
        if not files and not left:
            raise CorpusError(f"the folder {data} holds no files")
        return files, left, True
    if path.exists():
        raise CorpusError(f"{data} is neither a file nor a folder; save its content as a file and give that")
    if path.is_symlink():
        raise CorpusError(f"{data} is a link to {os.readlink(path)}, which does not exist")
    if glob.has_magic(data):
        files, left = files_matching(str(path))
        if not files and not left:
            raise CorpusError(f"no file matches {data!r}")
        return files, left, True
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    raise CorpusError(
        f"there is no file, folder or corpus called {data!r}; a corpus is {', '.join(NAMED)}, a path, a glob or a URL."
        + did_you_mean(path.name, [*NAMED, *siblings])
    )


def shakespeare(cache_dir: Path) -> Path:
    """Tiny Shakespeare (Karpathy 2015), from the folder $GPT_FOUNDRY_DATA, the cache, or the network."""
    folder = os.environ.get("GPT_FOUNDRY_DATA")
    path = Path(folder or "").absolute() / "tinyshakespeare.txt"
    if not (folder and path.is_file()):
        path = cache_dir.absolute() / "downloads" / "tinyshakespeare.txt"
        try:
            download(SHAKESPEARE_URL, path)
        except CorpusError as error:
            raise CorpusError(
                f"{error}; offline, set GPT_FOUNDRY_DATA to a folder that contains tinyshakespeare.txt, or use builtin"
            ) from error
    found = sha256(path)
    if found != SHAKESPEARE_SHA256:
        raise CorpusError(
            f"{path} is not tiny Shakespeare: its SHA-256 is {found}, expected {SHAKESPEARE_SHA256}; remove it"
        )
    return path


def open_file(path: Path, origin: Origin | None, column: str, separator: str, cache_dir: Path) -> list[Piece]:
    """The pieces of one file; none if it is empty. Raises CorpusError if it is not text in the expected form."""
    label = origin.url if origin else str(path)
    with open(path, "rb") as file:
        packed = formats.packing(path.name, file.read(HEAD_BYTES))
    if packed:
        path = unpacked_copy(path, label, column, cache_dir)
    kind = kind_of(path, label, column)
    if column == CONVERSATION and kind not in ("jsonl", "json", "parquet"):
        raise NotText(f"{label} is {kind}; expected conversations in JSON lines, JSON or Parquet", f"{kind}")
    column = "" if kind == "text" else column
    found = remembered_scan(path, kind, column, separator, label, cache_dir)
    pieces = [
        Piece(str(path), kind, start, end, column, found.digest, size, origin, label, separator)
        for start, end, size in zip(found.borders, found.borders[1:], found.sizes, strict=False)
        if size
    ]
    if kind == "jsonl" and pieces:
        next(pieces[0].documents(), None)  # finds a wrong column or format now
    return pieces


def kind_of(path: Path, label: str, column: str) -> str:
    """The kind of an uncompressed file. Raises CorpusError."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    return formats.kind_of(path.name, label, head, column, inside=lambda: formats.zip_names(str(path)))


def unpacked_copy(path: Path, label: str, column: str, cache_dir: Path) -> Path:
    """Decompresses the file into the cache. Raises CorpusError, before that, if the content is not text."""
    target = cache_dir.absolute() / "unpacked" / f"{stamp(path)}-{formats.bare(path.name)}"
    if not target.exists():
        with open(path, "rb") as packed, formats.unpacked(packed, label) as content:
            head = content.read(HEAD_BYTES)
            formats.kind_of(path.name, label, head, column)
            with written_whole(target) as file:
                file.write(head)
                shutil.copyfileobj(content, file)
    return target


def remembered_scan(path: Path, kind: str, column: str, separator: str, label: str, cache_dir: Path) -> Scan:
    """Scans the file, or reads the cached scan of a big file that has not changed."""
    big = path.stat().st_size >= MEMO_BYTES
    how: list[str | int] = [SCAN_FORMAT, kind, column, separator, PIECE_BYTES]
    memo = cache_dir.absolute() / "scans" / f"{stamp(path, *how)}.json"
    if big and memo.exists():
        return Scan(**json.loads(memo.read_text()))
    found = scan(path, kind, column, separator, label)
    if big:
        write_json(memo, asdict(found))
    return found


def stamp(path: Path, *more: str | int) -> str:
    """A cache key for a file: it changes with the file's path, size and modification time."""
    status = path.stat()
    facts = [str(path), status.st_size, status.st_mtime_ns, *more]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def without(corpus: Corpus, other: Corpus) -> tuple[Corpus, int]:
    """The corpus without the conversations that `other` has as well, and how many these are."""

    def digest(text: str) -> bytes:
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    ours = {digest(text) for text in corpus.documents()}
    both = {found for text in other.documents() if (found := digest(text)) in ours}
    pieces, count = [], 0
    for piece in corpus.pieces:
        left_out = tuple(number for number, text in piece.numbered() if digest(text) in both)
        pieces.append(replace(piece, left_out=left_out))
        count += len(left_out)
    return replace(corpus, pieces=tuple(pieces)), count


def split(corpus: Corpus, val_fraction: float) -> tuple[Corpus, Corpus]:
    """Splits into training and validation; validation is the last `val_fraction` of the bytes.

    The cut moves back to the start of the character (text), line (jsonl) or row (Parquet) it falls into. Raises
    ConfigError for a fraction outside (0, 1), CorpusError if either side would have no text.
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
            f"{corpus.name} is too small: {corpus.num_bytes} bytes cannot be split to keep "
            f"{val_fraction:.0%} for validation. Give more documents, another --val-fraction, or --val-data"
        )
    return replace(corpus, pieces=tuple(train)), replace(corpus, pieces=tuple(val))
