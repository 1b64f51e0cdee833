"""Detects a file's format by its name and first bytes: some form of text, compressed or not, or not text.

In: a name and bytes. Out: the kind that tells `pieces` how to read the file, and a decompressed stream, or a
CorpusError that says what the file is and what to do with it.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import shlex
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from gptcore.errors import CorpusError
from train_job.data.conversations import CONVERSATION, FIELDS

HEAD_BYTES = 2**16
"""The number of first bytes that are examined."""
FORMS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines"), "jsonl"),
    **dict.fromkeys((".parquet", ".parq", ".pq"), "parquet"),
    ".json": "json",
    ".csv": "csv",
    **dict.fromkeys((".tsv", ".tab"), "tsv"),
}
"""The kind of each suffix; other names mean plain text, unless the content says otherwise."""
PLAIN = frozenset({".txt", ".text", ".md", ".rst"})
"""Suffixes that always mean plain text."""
EXPECTED = "expected UTF-8 text, JSON lines, JSON, CSV, TSV or Parquet"


class NotText(CorpusError):
    """A file that is not text, by name or content; `what` it is. Among several files it is left out."""

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message, what)
        self.message, self.what = message, what

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Packing:
    """A compression format, recognised by suffix or first bytes; `opened` decompresses a stream."""

    name: str
    suffixes: tuple[str, ...]
    magic: re.Pattern[bytes]
    opened: Callable[[Any], IO[bytes]]


def zstd_opened(packed: IO[bytes]) -> IO[bytes]:
    """Decompresses a stream of zstd frames, as a buffered reader."""
    return io.BufferedReader(Zstd(packed), HEAD_BYTES)


class Zstd(io.RawIOBase):
    """Decompresses zstd frames. Raises EOFError if the last one is truncated, which the library does not."""

    def __init__(self, packed: IO[bytes]) -> None:
        import zstandard

        self._packed, self._content = packed, memoryview(b"")
        self._frames = zstandard.ZstdDecompressor(max_window_size=2**31)  # as `zstd --long=31` makes them
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            rest = self._frame.unused_data if self._frame and self._frame.eof else b""
            data = rest or self._packed.read(2**14)  # small: it may expand a thousandfold
            if not data:
                if self._frame and not self._frame.eof:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._frames.decompressobj()
            self._content = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count


PACKINGS = (
    Packing("gzip", (".gz", ".gzip"), re.compile(rb"\x1f\x8b"), gzip.open),  # type: ignore[arg-type]
    Packing("bzip2", (".bz2",), re.compile(rb"BZh[1-9]1AY&SY"), bz2.open),
    Packing("xz", (".xz", ".lzma"), re.compile(rb"\xfd7zXZ\0"), lzma.open),
    Packing("zstd", (".zst", ".zstd"), re.compile(rb"\x28\xb5\x2f\xfd"), zstd_opened),
)


def packing(name: str, head: bytes) -> Packing | None:
    """The compression of a file, by its first bytes or else its name; None if it has none or is empty."""
    if not head:
        return None
    by_content = (packing for packing in PACKINGS if packing.magic.match(head))
    return next(by_content, None) or next((p for p in PACKINGS if suffix(name) in p.suffixes), None)


def bare(name: str) -> str:
    """The name without a compression suffix."""
    return name[: -len(suffix(name))] if any(suffix(name) in packing.suffixes for packing in PACKINGS) else name


def suffix(name: str) -> str:
    """The last suffix in lower case, with its dot; "" if there is none."""
    return PurePosixPath(name).suffix.lower()


@contextmanager
def unpacked(stream: IO[bytes], name: str) -> Iterator[IO[bytes]]:
    """Decompresses the stream if needed. Raises CorpusError if that fails within the block."""
    buffered = io.BufferedReader(stream, HEAD_BYTES)  # type: ignore[type-var]
    how = packing(name, buffered.peek(1))
    if how is None:
        yield buffered
        return
    import zstandard

    try:
        with how.opened(buffered) as content:
            yield content
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # not about the content
            raise
        raise CorpusError(f"{name} is not a whole {how.name} file: {error}") from error


LEAVE = "Leave it out"
SAVE = "Save it as plain text, as pandoc and pdftotext do, and name that"
UNPACK = "Unpack it and name the folder"
CONVERT = "Convert it to Parquet or JSON lines"


def is_binary(head: bytes) -> bool:
    """Whether these first bytes have control characters that text does not have, or are not UTF-8."""
    if re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", head):
        return True
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be incomplete
    except UnicodeDecodeError:
        return True
    return False


@dataclass(frozen=True)
class NonTextFormat:
    """A format that is not text, recognised by suffix or first bytes, and what to do about it."""

    what: str
    suffixes: str
    magic: bytes
    advice: str = LEAVE
    written: bool = False
    """Whether such a file may consist of characters only; else a file of characters is text despite its first bytes."""

    def fits(self, name: str, head: bytes) -> bool:
        by_name = suffix(name) in self.suffixes.split()
        return by_name or bool(
            self.magic and re.match(self.magic, head, re.DOTALL) and (self.written or is_binary(head))
        )


NON_TEXT_FORMATS = (
    NonTextFormat("a PDF", ".pdf", rb"%PDF-", SAVE, written=True),
    NonTextFormat("an RTF document", ".rtf", rb"\{\\rtf", SAVE, written=True),
    NonTextFormat("an old Office document", ".doc .xls .ppt", rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", SAVE),
    NonTextFormat("a Word document", ".docx .docm", b"", SAVE),
    NonTextFormat("an Excel workbook", ".xlsx .xlsm", b"", "Save its sheet as CSV and name that"),
    NonTextFormat("a PowerPoint presentation", ".pptx", b"", SAVE),
    NonTextFormat("an OpenDocument file", ".odt .ods .odp", b"", SAVE),
    NonTextFormat("an e-book", ".epub .mobi .azw3 .djvu", rb".{60}BOOKMOBI", SAVE),
    NonTextFormat("a ZIP archive", ".zip .jar .whl", rb"PK(\x03\x04|\x05\x06)", UNPACK),
    NonTextFormat("a tar archive", ".tar .tgz .tbz2 .txz .tzst", rb".{257}ustar", UNPACK),
    NonTextFormat("a 7z archive", ".7z", rb"7z\xbc\xaf\x27\x1c", UNPACK),
    NonTextFormat("a RAR archive", ".rar", rb"Rar!\x1a\x07", UNPACK),
    NonTextFormat("an LZ4 file", ".lz4", rb"\x04\x22\x4d\x18", "Unpack it with `lz4 -d`, or pack it with zstd"),
    NonTextFormat("a file packed twice", "", rb"\x1f\x8b|BZh[1-9]1AY&SY|\xfd7zXZ\0|\x28\xb5\x2f\xfd", "Unpack it once"),
    NonTextFormat("a Brotli, Snappy or compress file", ".br .snappy", rb"\x1f\x9d", "Unpack it, or pack it with zstd"),
    NonTextFormat(
        "a Git LFS pointer, not the file itself",
        "",
        rb"version https://git-lfs\.github\.com/",
        "Run `git lfs pull`",
        written=True,
    ),
    NonTextFormat("an Arrow file", ".arrow .feather", rb"ARROW1|FEA1", CONVERT),
    NonTextFormat("an Avro file", ".avro", rb"Obj\x01", CONVERT),
    NonTextFormat("an ORC file", ".orc", b"", CONVERT),
    NonTextFormat("a TFRecord file", ".tfrecord .tfrecords", b"", CONVERT),
    NonTextFormat("a notebook", ".ipynb", b"", "Convert it: jupyter nbconvert --to markdown"),
    NonTextFormat("an SQLite database", ".sqlite .sqlite3", rb"SQLite format 3\0", CONVERT),
    NonTextFormat("an HDF5 file", ".h5 .hdf5", rb"\x89HDF", CONVERT),
    NonTextFormat("a NumPy file", ".npy .npz", rb"\x93NUMPY"),
    NonTextFormat("a model or a pickle", ".pt .pth .pkl .pickle .safetensors .gguf .onnx", rb"GGUF|\x80[\x02-\x05]"),
    NonTextFormat("a PNG picture", ".png", rb"\x89PNG"),
    NonTextFormat("a JPEG picture", ".jpg .jpeg", rb"\xff\xd8\xff"),
    NonTextFormat("a GIF picture", ".gif", rb"GIF8[79]a"),
    NonTextFormat("a picture", ".webp .bmp .tif .tiff .ico .heic .avif .psd", rb"RIFF....WEBP|II\*\0|MM\0\*"),
    NonTextFormat("sound", ".mp3 .wav .flac .ogg .opus .m4a .aac", rb"ID3[\x02-\x04]|RIFF....WAVE|OggS|fLaC"),
    NonTextFormat("a video", ".mp4 .mkv .avi .mov .webm", rb".{4}ftyp|\x1a\x45\xdf\xa3|RIFF....AVI "),
    NonTextFormat("a program", ".exe .dll .so .pyc .wasm", rb"\x7fELF|\0asm|\xca\xfe\xba\xbe"),
    NonTextFormat("a font", ".ttf .otf .woff .woff2", rb"wOF[F2]|OTTO"),
)
HTML_SUFFIXES = (".html", ".htm", ".xhtml", ".mhtml")
HTML = re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html[\s>])", re.IGNORECASE | re.DOTALL)
TAKE_OUT = "Take the text out, as pandoc and trafilatura do; to train on the markup, give it a name that ends in .txt"
ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def kind_of(name: str, label: str, head: bytes, column: str, inside: Callable[[], list[str]] = list) -> str:
    """The kind of a file with this name and these first bytes; `inside` lists the names in a ZIP archive.

    Raises NotText for a known other format, CorpusError for text in another encoding; messages call the file `label`.
    """
    name = bare(name)
    if head.startswith(b"PAR1") and (suffix(name) not in PLAIN or is_binary(head)):
        return "parquet"
    found = next((known for known in NON_TEXT_FORMATS if known.fits(name, head)), None)
    if found and found.what == "a ZIP archive":
        found = next((known for known in NON_TEXT_FORMATS if known.what == zip_kind(inside())), found)
    if found:
        raise NotText(f"{label} is {found.what}; {EXPECTED}. {found.advice}", found.what)
    if encoding := other_encoding(head):
        convert = f"iconv -f {encoding} -t UTF-8 {shlex.quote(label)} > utf8{suffix(name) or '.txt'}"
        raise wrong_text(name, f"{label} is {encoding} text, expected UTF-8. Convert it: {convert}", f"{encoding} text")
    if suffix(name) in HTML_SUFFIXES or (suffix(name) not in (*PLAIN, *FORMS) and HTML.match(head)):
        raise NotText(f"{label} is HTML; {EXPECTED}. {TAKE_OUT}", "HTML")
    if suffix(name) in FORMS:
        return FORMS[suffix(name)]
    return "jsonl" if suffix(name) not in PLAIN and is_json_line(head, column) else "text"


def known_by_name(name: str) -> str | None:
    """The format of a file whose name says that it is not text, else None."""
    return next((known.what for known in NON_TEXT_FORMATS if known.fits(bare(name), b"")), None)


def zip_kind(names: list[str]) -> str:
    """The format of a ZIP archive that contains these names."""
    for start, what in (
        ("word/", "a Word document"),
        ("xl/", "an Excel workbook"),
        ("ppt/", "a PowerPoint presentation"),
        ("META-INF/container.xml", "an e-book"),
        ("content.xml", "an OpenDocument file"),
        ("data.pkl", "a model or a pickle"),
    ):
        if any(name.startswith(start) or name.endswith(f"/{start}") for name in names):
            return what
    return "a ZIP archive"


def zip_names(path: str) -> list[str]:
    """The names in a ZIP archive; none if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return []


def other_encoding(head: bytes) -> str | None:
    """Detects UTF-16 or UTF-32 by its byte order mark, or UTF-16 by the NULs next to Latin letters."""
    for mark, encoding in ENCODINGS:
        if head.startswith(mark):
            return encoding
    start = head[: len(head) // 2 * 2][:1024]
    for encoding, low, high in (("UTF-16LE", 0, 1), ("UTF-16BE", 1, 0)):
        if len(start) >= 8 and start[high::2].count(0) > len(start) * 0.4 and 0 not in start[low::2]:
            return encoding
    return None


def is_json_line(head: bytes, column: str) -> bool:
    """Whether the first line is a JSON object with the field `column`."""
    line, newline, _ = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    if not line.startswith(b"{") or not (newline or len(head) < HEAD_BYTES):
        return False
    try:
        record = json.loads(line)
        return bool({*FIELDS} & {*record}) if column == CONVERSATION else column in record
    except (ValueError, RecursionError):
        return False


def wrong_text(name: str, message: str, what: str) -> CorpusError:
    """The error for a file that is not UTF-8 text: NotText, unless its name says that it is text."""
    return CorpusError(message) if suffix(bare(name)) in (*PLAIN, *FORMS) else NotText(message, what)
