"""A folder of texts: links are followed, each file is read once, and other files are skipped and reported."""

import gzip
import os
from pathlib import Path

import pytest

from gptcore.errors import CorpusError
from train_job.data.corpus import Corpus, open_corpus
from train_job.data.folders import LeftOut, summarize

PNG = b"\x89PNG\r\n\x1a\n\0"


def opened(data: Path | str, cache: Path, **more: str) -> Corpus:
    return open_corpus(str(data), cache_dir=cache, **more)


def texts(data: Path | str, cache: Path) -> list[str]:
    return list(opened(data, cache).documents())


def left_out(corpus: Corpus) -> dict[str, str]:
    return {left.name: left.why for left in corpus.left_out}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Texts in a folder, and others that links in it lead to."""
    for name in ("data/b.txt", "data/deep/c.txt", "elsewhere/x.txt", "elsewhere/deeper/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path / "data"


def test_linked_folders_are_followed_and_each_file_is_read_once(folder: Path, tmp_path: Path) -> None:
    before = opened(folder, tmp_path / "cache").fingerprint
    (folder / "a-loop").symlink_to(folder)
    (folder / "deep" / "up").symlink_to("..")
    (folder / "a-again.txt").symlink_to("b.txt")
    (folder / "a-deep").symlink_to("deep")
    assert opened(folder, tmp_path / "cache").fingerprint == before, "nothing of it is new"
    (folder / "linked").symlink_to("../elsewhere")
    (folder / "z.txt").symlink_to("../elsewhere/x.txt")
    assert texts(folder, tmp_path / "cache") == [
        "data/b.txt",
        "data/deep/c.txt",
        "elsewhere/deeper/y.txt",
        "elsewhere/x.txt",
    ]
    (tmp_path / "way-in").symlink_to(folder)
    assert len(texts(tmp_path / "way-in", tmp_path / "cache")) == 4
    assert sorted(texts(f"{folder}/**/*.txt", tmp_path / "cache")) == sorted(texts(folder, tmp_path / "cache"))


def test_files_that_are_not_text_are_skipped_and_reported(folder: Path, tmp_path: Path) -> None:
    before = texts(folder, tmp_path / "cache")
    (folder / "pic.png").write_bytes(PNG)
    (folder / "deep" / "data").write_bytes(b"\1\0\2\0\3\xff")
    (folder / "old").write_bytes("Grüße".encode("latin-1"))
    (folder / "page.html").write_text("<p>Hello")
    (folder / "packed.gz").write_bytes(gzip.compress(PNG))
    (folder / "empty.txt").touch()
    (folder / "gone.txt").symlink_to("nowhere.txt")
    os.mkfifo(folder / "pipe")
    expected = {
        "pic.png": "a PNG picture",
        "deep/data": "binary",
        "old": "not UTF-8 text",
        "page.html": "HTML",
        "packed.gz": "a PNG picture",
        "empty.txt": "empty",
        "gone.txt": "a link to nowhere.txt, which does not exist",
        "pipe": "neither file nor folder",
    }
    corpus = opened(folder, tmp_path / "cache")
    assert list(corpus.documents()) == before
    assert left_out(corpus) == expected
    assert len(left_out(opened(f"{folder}/*", tmp_path / "cache"))) == 7


def test_a_named_file_or_a_txt_file_that_is_not_text_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "pic.png").write_bytes(PNG)
    with pytest.raises(CorpusError, match=r"pic\.png is a PNG picture"):
        opened(folder / "pic.png", tmp_path / "cache")
    (folder / "old.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"old\.txt is not UTF-8 text: byte 2 is 0xfc"):
        opened(folder, tmp_path / "cache")
    (folder / "old.txt").write_text("Grüße", encoding="utf-16")
    with pytest.raises(CorpusError, match=r"old\.txt is UTF-16 text"):
        opened(folder, tmp_path / "cache")


def test_a_folder_without_any_text_is_refused_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pic.png").write_bytes(PNG)
    (tmp_path / "data" / "gone").symlink_to("nowhere")
    for data in (tmp_path / "data", f"{tmp_path}/data/*"):
        with pytest.raises(
            CorpusError, match=r"holds no text: left out are 2 files: .*gone .*pic\.png \(a PNG picture"
        ):
            opened(data, tmp_path / "cache")
    with pytest.raises(CorpusError, match="gone is a link to nowhere, which does not exist"):
        opened(tmp_path / "data" / "gone", tmp_path / "cache")


def test_some_skipped_files_are_named_and_the_others_counted() -> None:
    assert summarize([LeftOut("a.png", "a PNG picture")]) == "1 file: a.png (a PNG picture)"
    twelve = [LeftOut(f"{n}.png", "a PNG picture") for n in range(12)]
    assert summarize(twelve).startswith("12 files: 0.png (a PNG picture), ")
    assert summarize(twelve).endswith("9.png (a PNG picture) and 2 more")
