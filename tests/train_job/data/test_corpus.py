"""Where text comes from: what a name refers to, how the text is split, and errors if it is not text."""

import gzip
import json
import os
import threading
import tracemalloc
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.errors import ConfigError, CorpusError
from train_job.data import corpus as corpus_module
from train_job.data import pieces
from train_job.data.corpus import Corpus, open_corpus, split

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402


def text_of(corpus: Corpus) -> str:
    return "".join(corpus.documents())


def write_parquet(path: Path, texts: list[str | None], **options) -> None:
    table = pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, pyarrow.string())})
    parquet.write_table(table, path, **options)


# --- what a name leads to -------------------------------------------------------------------------------------------


def test_builtin_works_offline_and_has_no_paragraph_twice(tmp_path):
    corpus = open_corpus("builtin", cache_dir=tmp_path)
    documents = list(corpus.documents())
    paragraphs = [paragraph for document in documents for paragraph in document.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert corpus.num_bytes == len(text_of(corpus).encode()) > 200_000
    assert len(documents) > 50
    assert corpus.fingerprint == open_corpus("builtin", cache_dir=tmp_path).fingerprint


def test_shakespeare_is_found_offline_and_split_as_in_nanogpt(shakespeare, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_FOUNDRY_DATA", str(shakespeare.parent))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("went to the network"))
    train, validation = split(open_corpus("shakespeare", cache_dir=tmp_path), 0.1)
    text = shakespeare.read_text()
    assert text_of(train) == text[: int(0.9 * len(text))]
    assert text_of(validation) == text[int(0.9 * len(text)) :]


def test_shakespeare_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("GPT_FOUNDRY_DATA", raising=False)
    monkeypatch.setattr(corpus_module, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    with pytest.raises(CorpusError, match=r"cannot download .*; offline, set GPT_FOUNDRY_DATA .*builtin"):
        open_corpus("shakespeare", cache_dir=tmp_path)


def test_altered_shakespeare_is_refused(tmp_path, monkeypatch):
    (tmp_path / "tinyshakespeare.txt").write_text("To be, or not to bee")
    monkeypatch.setenv("GPT_FOUNDRY_DATA", str(tmp_path))
    with pytest.raises(CorpusError, match=r"SHA-256 is [0-9a-f]{64}, expected 86c4e6aa"):
        open_corpus("shakespeare", cache_dir=tmp_path)


@pytest.fixture
def web(tmp_path):
    """A folder and the address under which it is served."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def send_response(self, code, message=None):
            super().send_response(code, message)
            server.answers.append(int(code))

        def send_header(self, keyword, value):
            promised = keyword == "Content-Length" and "short" in self.path  # more than comes
            super().send_header(keyword, "9" if promised else value)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    server.answers = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", server
    server.shutdown()
    server.server_close()


def test_a_url_is_downloaded_again_only_if_it_has_changed(web, tmp_path, caplog):
    folder, address, server = web
    (folder / "story.txt").write_text("Once upon a time")
    for _ in range(2):
        assert text_of(open_corpus(f"{address}/story.txt", cache_dir=tmp_path)) == "Once upon a time"
    assert server.answers == [200, 304]
    assert not caplog.messages
    (folder / "story.txt").write_text("Twice")
    os.utime(folder / "story.txt", (2e9, 2e9))
    assert text_of(open_corpus(f"{address}/story.txt", cache_dir=tmp_path, refresh=False)) == "Once upon a time"
    assert server.answers == [200, 304], "a resumed run sends no request"
    assert text_of(open_corpus(f"{address}/story.txt", cache_dir=tmp_path)) == "Twice"
    assert f"{address}/story.txt has changed" in caplog.messages[-1]


def test_an_unreachable_url_is_read_from_its_copy_with_a_warning(web, tmp_path, caplog):
    folder, address, server = web
    (folder / "story.txt").write_text("Once upon a time")
    open_corpus(f"{address}/story.txt", cache_dir=tmp_path)
    (folder / "story.txt").unlink()
    assert text_of(open_corpus(f"{address}/story.txt", cache_dir=tmp_path)) == "Once upon a time"
    assert f"cannot check {address}/story.txt for changes (File not found); using the copy" in caplog.messages[-1]
    server.shutdown()
    server.server_close()
    assert text_of(open_corpus(f"{address}/story.txt", cache_dir=tmp_path)) == "Once upon a time"
    assert "refused" in caplog.messages[-1]


def test_a_machine_downloads_a_missing_page_once_for_all_its_readers(web, tmp_path):
    folder, address, server = web
    (folder / "story.txt.gz").write_bytes(gzip.compress(b"Once upon a time"))
    corpus = open_corpus(f"{address}/story.txt.gz", cache_dir=tmp_path / "one")
    assert server.answers == [200]
    elsewhere = corpus.within(tmp_path / "two")
    with ThreadPoolExecutor(8) as readers:
        assert set(readers.map(text_of, [elsewhere] * 8)) == {"Once upon a time"}
    assert server.answers == [200, 200]
    (folder / "story.txt.gz").write_bytes(gzip.compress(b"Twice"))
    with pytest.raises(CorpusError, match=rf"{address}/story.txt.gz has changed since the run began"):
        text_of(corpus.within(tmp_path / "three"))


@pytest.mark.parametrize(("name", "reason"), [("nothing.txt", "File not found"), ("short.txt", "4 of 9 bytes arrived")])
def test_a_failed_download_says_why_and_leaves_no_file(web, tmp_path, name, reason):
    folder, address, _ = web
    (folder / "short.txt").write_text("Once")
    with pytest.raises(CorpusError, match=rf"cannot download {address}/{name}: {reason}"):
        open_corpus(f"{address}/{name}", cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_folder_is_read_in_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.txt", "c.md", ".hidden.txt", ".git/x.txt", "empty.txt"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name == "empty.txt" else name)
    assert list(open_corpus(str(tmp_path / "data"), cache_dir=tmp_path).documents()) == ["a/z.txt", "b.txt", "c.md"]
    assert list(open_corpus(str(tmp_path / "data" / "**/*.txt"), cache_dir=tmp_path).documents()) == [
        "a/z.txt",
        "b.txt",
    ]


def test_each_json_line_is_a_document_gzipped_or_not(tmp_path):
    texts = ["one", "two\nlines", "drei 🙂"]
    lines = "\n".join(json.dumps({"body": text, "id": 1}) for text in texts) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "b.jsonl.gz"):
        assert list(open_corpus(str(tmp_path / name), "body", tmp_path / "cache").documents()) == texts


@pytest.mark.parametrize("options", [{}, {"row_group_size": 7}, {"use_dictionary": False}])
def test_parquet_rows_are_documents(tmp_path, options, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    texts = [None if n % 9 == 0 else f"row {n} ü" for n in range(50)]
    write_parquet(tmp_path / "a.parquet", texts, **options)
    corpus = open_corpus(str(tmp_path / "a.parquet"), cache_dir=tmp_path)
    assert list(corpus.documents()) == [text for text in texts if text]
    assert corpus.num_bytes == len(text_of(corpus).encode())
    assert len(corpus.pieces) == (6 if "row_group_size" in options else 1)


# --- pieces and the split -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["word word\n", "  - item\n\n", "no line at all ", "語り"])
def test_a_big_text_is_cut_into_small_pieces_that_add_up_to_the_whole(tmp_path, monkeypatch, line):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    (tmp_path / "big.txt").write_text(line * 700)
    corpus = open_corpus(str(tmp_path / "big.txt"), cache_dir=tmp_path)
    assert text_of(corpus) == line * 700
    assert 1 < len(corpus.pieces) < 20
    assert max(piece.num_bytes for piece in corpus.pieces) <= 1000


def test_a_line_of_json_is_never_cut_in_two(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    texts = ["x" * size for size in (10, 3000, 10, 990, 5000, 1)]
    (tmp_path / "big.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = open_corpus(str(tmp_path / "big.jsonl"), cache_dir=tmp_path)
    assert len(corpus.pieces) > 1
    assert list(corpus.documents()) == texts


def test_a_big_file_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2**20)
    (tmp_path / "big.txt").write_bytes(b"a line of text, as it were\n" * 2**20)  # 27 MiB
    tracemalloc.start()
    train, validation = split(open_corpus(str(tmp_path / "big.txt"), cache_dir=tmp_path), 0.1)
    length = sum(len(text) for half in (train, validation) for text in half.documents())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert length == 27 * 2**20
    assert peak < 10 * 2**20


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_big_file_is_scanned_once_until_it_changes(tmp_path, monkeypatch, kind):
    def write(text):
        if kind == "parquet":
            write_parquet(tmp_path / "a.parquet", [text])
        else:
            (tmp_path / f"a.{kind}").write_text(json.dumps({"text": text}) if kind == "jsonl" else text)

    monkeypatch.setattr(corpus_module, "MEMO_BYTES", 1)
    write("first")
    first = open_corpus(str(tmp_path / f"a.{kind}"), cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        for scan in ("scan",):
            patch.setattr(corpus_module, scan, lambda *_: pytest.fail("scanned again"))
        assert open_corpus(str(tmp_path / f"a.{kind}"), cache_dir=tmp_path) == first
    write("second")
    assert open_corpus(str(tmp_path / f"a.{kind}"), cache_dir=tmp_path).fingerprint != first.fingerprint


TEXTS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60), min_size=1, max_size=6)


@given(texts=TEXTS, fraction=st.floats(0.01, 0.99))
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_the_split_neither_loses_nor_repeats_text(tmp_path, kind, texts, fraction):
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    if kind == "txt":
        for n, text in enumerate(texts):
            (folder / f"{n}.txt").write_bytes(text.encode())
    elif kind == "jsonl":
        (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    else:
        write_parquet(folder / "a.parquet", texts, row_group_size=2)
    try:
        corpus = open_corpus(str(folder), cache_dir=tmp_path)
        train, validation = split(corpus, fraction)
    except CorpusError as error:
        assert "holds no" in str(error) or "too small" in str(error)  # noqa: PT017
        return
    whole = "".join(texts)
    assert text_of(train) + text_of(validation) == whole
    assert train.num_bytes + validation.num_bytes == corpus.num_bytes
    assert train.num_bytes <= (1 - fraction) * corpus.num_bytes
    if kind == "txt":
        assert (1 - fraction) * corpus.num_bytes - train.num_bytes < 4  # less than a character
    else:
        assert list(train.documents()) + list(validation.documents()) == [text for text in texts if text]


def test_builtin_is_split_to_the_byte(tmp_path):
    corpus = open_corpus("builtin", cache_dir=tmp_path)
    train, validation = split(corpus, 0.1)
    assert text_of(train) + text_of(validation) == text_of(corpus)
    assert 0 <= int(0.9 * corpus.num_bytes) - train.num_bytes < 4


def test_fingerprint_depends_on_the_text_and_not_on_its_path(tmp_path):
    for name, text in (("a.txt", "same"), ("b.txt", "same"), ("c.txt", "other")):
        (tmp_path / name).write_text(text)
    a, b, c = (
        open_corpus(str(tmp_path / name), cache_dir=tmp_path).fingerprint for name in ("a.txt", "b.txt", "c.txt")
    )
    assert a == b != c


# --- what is not text -----------------------------------------------------------------------------------------------

BAD_FILES = [
    ("empty.txt", b"", "holds no text: it is empty"),
    ("picture.txt", b"\x89PNG\r\n\0\0", r"picture\.txt is a PNG picture; expected UTF-8 text"),
    ("latin.txt", "Grüße".encode("latin-1"), r"latin\.txt is not UTF-8 text: byte 2 is 0xfc"),
    ("cut.txt", "Größe".encode()[:3], r"cut\.txt is not UTF-8 text: byte 2 is 0xc3"),
    ("a.jsonl", b'{"body": "x", "id": 1}\n', r"a\.jsonl, line 1: no field 'text'; there are body, id"),
    ("near.jsonl", b'{"Text": "x"}\n', r"no field 'text'; there are Text\. Did you mean 'Text'\?"),
    ("list.jsonl", b"[1]\n", r"line 1: expected an object with a field 'text', found list"),
    ("number.jsonl", b'{"text": 5}\n', r"line 1: field 'text' is int, expected text"),
    ("half.jsonl", b'{"text": "\\ud83d"}\n', r"line 1: .*surrogates"),
    ("bad.parquet", b"PAR1 not really", r"bad\.parquet is not a complete Parquet file"),
    ("bad.txt.gz", b"\x1f\x8b not really", r"bad\.txt\.gz is not a whole gzip file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[name for name, *_ in BAD_FILES])
def test_a_file_that_is_not_text_is_named_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        open_corpus(str(tmp_path / name), cache_dir=tmp_path / "cache")


def test_a_bad_line_deep_in_a_file_is_named_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 200)
    lines = [json.dumps({"text": f"line {n}"}) for n in range(1, 101)]
    lines[76] = '{"text": "cut sho'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = open_corpus(str(tmp_path / "a.jsonl"), cache_dir=tmp_path)
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 77: not JSON"):
        list(corpus.documents())


def test_bad_bytes_after_the_first_piece_are_named_by_their_position(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    for bad, message in ((b"\0", "byte 1234 is NUL"), (b"\xff", "byte 1234 is 0xff")):
        (tmp_path / "a.txt").write_bytes(b"0123456789" * 123 + b"0123" + bad + b"rest\n" * 300)
        with pytest.raises(CorpusError, match=message):
            open_corpus(str(tmp_path / "a.txt"), cache_dir=tmp_path)


def test_parquet_without_the_column_names_those_it_has(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"])
    with pytest.raises(CorpusError, match=r"has no column 'txt'; it has id, text\. Did you mean 'text'\?"):
        open_corpus(str(tmp_path / "a.parquet"), "txt", tmp_path)
    with pytest.raises(CorpusError, match="column 'id' holds int64, expected text"):
        open_corpus(str(tmp_path / "a.parquet"), "id", tmp_path)


def test_parquet_with_bytes_for_text_is_refused(tmp_path):
    texts = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet: column 'text' has a row that is not UTF-8"):
        text_of(open_corpus(str(tmp_path / "a.parquet"), cache_dir=tmp_path))


def test_a_missing_corpus_gets_the_nearest_name_as_a_hint(tmp_path, monkeypatch):
    (tmp_path / "stories.txt").write_text("x")
    with pytest.raises(CorpusError, match=r"Did you mean 'stories\.txt'\?"):
        open_corpus(str(tmp_path / "storys.txt"), cache_dir=tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match=r"called 'shakspeare'.*Did you mean 'shakespeare'\?"):
        open_corpus("shakspeare", cache_dir=tmp_path)
    with pytest.raises(CorpusError, match=r"no file matches '\*\.nothing'"):
        open_corpus("*.nothing", cache_dir=tmp_path)
    with pytest.raises(CorpusError, match="no corpus given"):
        open_corpus("", cache_dir=tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "void").mkdir()
    with pytest.raises(CorpusError, match=r"the folder .*void holds no files"):
        open_corpus(str(tmp_path / "void"), cache_dir=tmp_path)


def test_a_file_that_was_deleted_or_truncated_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    corpus = open_corpus(str(path), cache_dir=tmp_path)
    path.write_text("less")
    with pytest.raises(CorpusError, match=r"a\.txt has been truncated"):
        text_of(corpus)
    path.unlink()
    with pytest.raises(CorpusError, match=r"cannot read .*a\.txt: No such file"):
        text_of(corpus)


def test_a_text_too_small_to_split_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "the only line"}')
    with pytest.raises(CorpusError, match="is too small: 25 bytes cannot be split to keep 10%"):
        split(open_corpus(str(tmp_path / "a.jsonl"), cache_dir=tmp_path), 0.1)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_validation_fraction_out_of_range_is_refused(tmp_path, fraction):
    with pytest.raises(ConfigError, match=r"val_fraction is .*more than 0 and less than 1"):
        split(open_corpus("builtin", cache_dir=tmp_path), fraction)
