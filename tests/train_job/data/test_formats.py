"""A file's format follows from its name and content. It is read in that format or refused by name."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from gptcore.errors import CorpusError
from tests.chance import examples
from train_job.data import pieces, records
from train_job.data.corpus import Corpus, open_corpus, split

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

TEXTS = ["one", 'two\nlines, "quoted"; and\ttabs', "drei 🙂 [x] {}", "  ", "vier\r\nfünf"]
RECORDS = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def table(delimiter: str, rows: list[dict] = RECORDS) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def opened(path: Path, column: str = "text", **more: str) -> Corpus:
    return open_corpus(str(path), column, path.parent / "cache", **more)


FORMS = {
    "lines.jsonl": LINES,
    "LINES.JSONL": LINES,
    "lines.ndjson": LINES,
    "lines.json": LINES,
    "array.json": json.dumps(RECORDS),
    "pretty.JSON": json.dumps(RECORDS, indent=2, ensure_ascii=False),
    "one-by-one.json": "\n\n".join(json.dumps(record, indent=2) for record in RECORDS),
    "table.csv": table(","),
    "table.CSV": table(";"),
    "table.tsv": table("\t"),
    "no-suffix": LINES,
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".GZ": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", FORMS)
def test_a_file_is_read_by_its_extension_compressed_or_not(tmp_path: Path, name: str, packed: str) -> None:
    for mark in ("", "\ufeff"):
        path = tmp_path / f"{len(mark)}-{name}{packed}"
        path.write_bytes(PACKERS[packed]((mark + FORMS[name]).encode()))
        assert list(opened(path).documents()) == TEXTS


def test_zstd_is_read_frame_by_frame_and_a_truncated_file_is_refused(tmp_path: Path) -> None:
    frames = [zstandard.ZstdCompressor().compress(f"part {n}\n".encode() * 5000) for n in range(9)]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    assert "".join(opened(tmp_path / "a.txt.zst").documents()) == "".join(f"part {n}\n" * 5000 for n in range(9))
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames)[:-3])
    with pytest.raises(CorpusError, match=r"a\.txt\.zst is not a whole zstd file: it ends in the middle of a frame"):
        opened(tmp_path / "a.txt.zst")


@pytest.mark.parametrize(("suffix", "kind"), [(".gz", "gzip"), (".bz2", "bzip2"), (".xz", "xz"), (".zst", "zstd")])
def test_an_invalid_or_truncated_compressed_file_is_refused_by_name(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    for content in (b"not packed at all", PACKERS[suffix](b"some text " * 1000)[:-7]):
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=rf"a\.txt{suffix} is not a whole {kind} file"):
            opened(path)
    assert not list((tmp_path / "cache" / "unpacked").glob("*"))


@pytest.mark.parametrize("packer", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gzip", "zstd"])
def test_a_compressed_file_is_recognised_whatever_its_name(tmp_path: Path, packer: Callable[[bytes], bytes]) -> None:
    (tmp_path / "notes.txt").write_bytes(packer(b"some text"))
    assert list(opened(tmp_path / "notes.txt").documents()) == ["some text"]


def test_a_byte_order_mark_is_not_text_and_files_without_one_are_unchanged(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfsome text")
    (tmp_path / "b.txt").write_bytes(b"some text")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    assert [list(opened(tmp_path / name).documents()) for name in ("a.txt", "b.txt")] == [["some text"]] * 2
    assert opened(tmp_path / "a.txt").num_bytes == 9
    with pytest.raises(CorpusError, match="holds no text"):
        opened(tmp_path / "mark.txt")


def test_a_text_keeps_the_fingerprint_of_earlier_versions(tmp_path: Path) -> None:
    """Otherwise a run that began with an earlier version would not find its text."""
    (tmp_path / "a.txt").write_text("a line of text\n" * 9)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "c.jsonl").write_text('\ufeff{"text": "one"}\n')
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"some text"))
    known = {
        "a.txt": "100e61fa200e0ca6",
        "b.jsonl": "ef14bc86132eb3ea",
        "c.jsonl": "44968dce5f363b68",
        "d.txt.gz": "217adb04fe95bb5d",
    }
    assert {name: opened(tmp_path / name).fingerprint[:16] for name in known} == known


# --- JSON and CSV ---------------------------------------------------------------------------------------------------

some_texts = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40), max_size=12)


@given(texts=some_texts, fraction=st.floats(0.01, 0.99), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
@examples(60)
@pytest.mark.parametrize("name", ["a.json", "lines.json", "a.csv"])
def test_wherever_it_is_split_nothing_is_lost_or_repeated(
    tmp_path: Path, name: str, texts: list[str], fraction: float, indent: int | None, ascii_only: bool
) -> None:
    rows = [{"id": n, "text": text} for n, text in enumerate(texts)]
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    array = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    content = {"a.json": array, "lines.json": lines, "a.csv": table(",", rows)}[name]
    (tmp_path / name).write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", 90)
        patch.setattr(records, "BLOCK_BYTES", 7)
        try:
            corpus = opened(tmp_path / name)
            halves = split(corpus, fraction)
        except CorpusError as error:
            assert "holds no text" in str(error) or "too small" in str(error)  # noqa: PT017
            return
        expected = [text for text in texts if text]
        assert list(corpus.documents()) == expected
        assert [text for half in halves for text in half.documents()] == expected
        assert sum(half.num_bytes for half in halves) == corpus.num_bytes


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_a_big_file_of_records_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2**20)
    rows = [{"id": n, "text": f"row {n} of many" * 20} for n in range(20_000)]
    (tmp_path / name).write_text(json.dumps(rows) if name == "a.json" else table(",", rows))
    assert (tmp_path / name).stat().st_size > 6 * 2**20
    del rows
    tracemalloc.start()
    corpus = opened(tmp_path / name)
    count = sum(1 for half in split(corpus, 0.1) for _ in half.documents())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 8 * 2**20


WRONG = [
    ("a.json", '[{"text": "x"}, {"txt": "y"}]', r"a\.json, line 1, element 2: no field 'text'; there are txt"),
    ("a.json", '[\n{"text": "x"},\n{"text": 5}\n]', "line 3, element 2: field 'text' is int, expected text"),
    ("a.json", '[{"text": "x"}, "y"]', "element 2: expected an object with a field 'text', found str"),
    ("a.json", '[{"text": "x"}, null]', "element 2: expected an object with a field 'text', found NoneType"),
    ("a.json", '[["x"]]', "element 1: expected an object with a field 'text', found list"),
    ("a.json", '[{"text": "x"}, {"text": "y"}', "element 2: the file ends before its array does"),
    ("a.json", '[{"text": "x"}, {"text": "y', r"line 1, .*not JSON \(Unterminated string"),
    ("a.json", '[{"text": "x"} {"text": "y"}]', "where ',' is expected before the next value"),
    ("a.json", '[{"text": "x"},\n{text: 1}]', r"line 2, .*not JSON \(Expecting property name"),
    ("a.json", '{"text": "x"}, {"text": "y"}', "',' where nothing is expected"),
    ("a.json", '{"data": [{"text": "x"}]}', "element 1: no field 'text'; there are data"),
    ("a.json", '{"text": "\\ud83d"}', "surrogates"),
    ("a.json", "[" * 100_000, "expected an object with a field 'text', found list"),
    ("a.json", '{"a":' * 100_000, "nested too deeply"),
    ("a.jsonl", '{"a":' * 100_000, "line 1: not JSON"),
    ("a.csv", "id,txt\n1,x\n", r"a\.csv has no column 'text'; it has id, txt\. Did you mean 'txt'\?"),
    ("a.csv", "id;body\n1;x\n", "it has id, body"),
    ("a.csv", "id,text\n1,x\n2,y,and more\n", "line 3: the row has 3 fields, the first row 2"),
    ("a.csv", 'id,text\n1,x\n2,"y\n3,z\n', "line 3: a field begins with a quotation mark that is not closed"),
    ("a.tsv", "id\ttext\n1\n", "line 2: the row has 1 fields, the first row 2"),
    ("a.csv", "id,text\n", "holds no text"),
    ("a.json", "[]", "holds no text"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG, ids=[name for name, *_ in WRONG])
def test_an_invalid_record_is_named_by_its_position(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=message):
        opened(tmp_path / name)


def test_a_value_without_an_end_is_refused_before_it_fills_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LONGEST_RECORD", 2**22)
    (tmp_path / "a.json").write_text('[{"text": "' + "x" * 2**24)
    with pytest.raises(CorpusError, match="element 1: a value has more than 4,194,304 characters"):
        opened(tmp_path / "a.json")


# --- Parquet --------------------------------------------------------------------------------------------------------

COLUMNS = {
    "string": pyarrow.string(),
    "large": pyarrow.large_string(),
    "view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    "binary": pyarrow.binary(),
    "dictionary of binary": pyarrow.dictionary(pyarrow.int32(), pyarrow.binary()),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_of_text_is_read_however_it_is_stored(tmp_path: Path, column: str) -> None:
    kind = COLUMNS[column]
    values = [None if n == 2 else text for n, text in enumerate(TEXTS)]
    plain = pyarrow.array(values, pyarrow.binary() if "binary" in column else pyarrow.string())
    stored = plain.dictionary_encode() if "dictionary" in column else plain.cast(kind)
    parquet.write_table(pyarrow.table({"text": stored}), tmp_path / "a.parquet")
    assert list(opened(tmp_path / "a.parquet").documents()) == [text for text in values if text]


def test_a_parquet_file_with_only_nulls_has_no_documents_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    parquet.write_table(pyarrow.table({"text": ["In a row."]}), tmp_path / "many" / "a.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(3)}), tmp_path / "many" / "b.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(3, pyarrow.string())}), tmp_path / "many" / "c.parquet")
    corpus = open_corpus(str(tmp_path / "many"), cache_dir=tmp_path / "cache")
    assert list(corpus.documents()) == ["In a row."]
    assert [(left.name, left.why) for left in corpus.left_out] == [
        ("b.parquet", "no text in it"),
        ("c.parquet", "no text in it"),
    ]
    with pytest.raises(CorpusError, match=r"b\.parquet holds no text: every document in it is empty"):
        open_corpus(str(tmp_path / "many" / "b.parquet"), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("values", [[["x"]], [{"text": "x"}], [1.5], [True]])
def test_a_column_that_is_not_text_is_refused(tmp_path: Path, values: list) -> None:
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet: column 'text' holds .*, expected text"):
        opened(tmp_path / "a.parquet")


# --- Not text -------------------------------------------------------------------------------------------------------


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return file.getvalue()


NOT_TEXT = [
    ("paper.pdf", b"%PDF-1.4\n", "is a PDF; expected UTF-8 text.*pdftotext"),
    ("paper", b"%PDF-1.4\n", "is a PDF"),
    ("letter.docx", b"whatever", "is a Word document.*pandoc"),
    ("letter", zipped("[Content_Types].xml", "word/document.xml"), "is a Word document"),
    ("sheet", zipped("xl/workbook.xml"), "is an Excel workbook.*CSV"),
    ("texts.zip", zipped("a.txt"), "is a ZIP archive.*Unpack it and name the folder"),
    ("texts.tar", tarred(), "is a tar archive.*Unpack it"),
    ("texts.tar.gz", gzip.compress(tarred()), "is a tar archive"),
    ("texts.tgz", gzip.compress(tarred()), "is a tar archive"),
    ("twice.txt.gz", gzip.compress(gzip.compress(b"x")), "is a file packed twice"),
    ("page.html", b"<p>Hello", "is HTML.*trafilatura.*ends in .txt"),
    ("page.HTM", b"Hello", "is HTML"),
    ("page.html.gz", gzip.compress(b"<p>Hello"), "is HTML"),
    ("download", b"\n<!DOCTYPE html>\n<html>", "is HTML"),
    ("pic.png", b"\x89PNG\r\n\x1a\n\0", "is a PNG picture"),
    ("pic.txt", b"\xff\xd8\xff\xe0", "is a JPEG picture"),
    ("song", b"ID3\x03\0", "is sound"),
    ("rows.arrow", b"ARROW1\0\0", "is an Arrow file.*Convert it to Parquet"),
    ("rows.db", b"SQLite format 3\0", "is an SQLite database"),
    ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer.*git lfs pull"),
    ("bom.txt", "\ufeffhello".encode("utf-16-le"), r"is UTF-16 text, expected UTF-8.*iconv -f UTF-16 -t UTF-8 .*bom"),
    ("bom.jsonl", '\ufeff{"text": "x"}'.encode("utf-16-be"), "is UTF-16 text"),
    ("bom.csv.gz", gzip.compress("\ufeffid,text".encode("utf-16")), "is UTF-16 text"),
    ("no-bom.txt", "hello, reader".encode("utf-16-le"), "is UTF-16LE text"),
    ("wide.txt", "\ufeffhello".encode("utf-32-le"), "is UTF-32 text"),
]


@pytest.mark.parametrize(("name", "content", "message"), NOT_TEXT, ids=[name for name, *_ in NOT_TEXT])
def test_a_file_that_is_not_text_is_named_by_its_kind_with_what_to_do(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message) as caught:
        opened(tmp_path / name)
    assert name in str(caught.value)


def test_markup_and_json_in_a_txt_file_are_text(tmp_path: Path) -> None:
    for text in ("<!DOCTYPE html><p>Hello", '{"text": "x"}\n'):
        (tmp_path / "a.txt").write_text(text)
        assert list(opened(tmp_path / "a.txt").documents()) == [text]


@pytest.mark.parametrize(
    "text", ["OTTO OF THE SILVER HAND", "GIF89a is a format", "PAR1 is how it begins", f"{'m' * 257}ustard and more"]
)
def test_a_text_that_begins_like_a_binary_file_is_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert list(open_corpus(str(tmp_path / "a.txt"), "text", tmp_path).documents()) == [text]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a", "n": ' + b"9" * 5000 + b"}]", "line 1, element 1: not JSON that can be read"),
        (
            "a.jsonl",
            b'[{"text": "a"},\n{"text": "b"}]\n',
            "to read an array of objects, give the file a name",
        ),
        ("a.csv", b"text,text\na,b\n", "has 2 columns 'text', expected one; rename the others"),
        ("a.csv", b"n,text\r1,a\r", "a lone carriage return"),
        ("a.tsv", b'n\ttext\n1\t"a" b\n', "a field begins with a quotation mark that is not closed"),
        ("a.ipynb", b'{"cells": []}', "is a notebook"),
    ],
)
def test_an_unreadable_record_says_what_to_do(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=re.escape(message)):
        list(open_corpus(str(tmp_path / name), "text", tmp_path).documents())
