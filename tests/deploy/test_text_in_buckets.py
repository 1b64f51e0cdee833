"""Text at a URL: on a real S3 server and on an emulated Google Cloud Storage."""

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from gptcore.errors import CorpusError
from gptcore.hub import resolve
from gptcore.package import open_package
from gptcore.tokenizer import load_tokenizer
from tests.deploy.conftest import Store
from tests.deploy.test_storage import small_package
from tests.refusals import one_error
from tests.system.conftest import SMALL
from train_job import run
from train_job.data.corpus import Corpus, open_corpus
from train_job.data.shards import TokenSet, prepare
from train_job.training.storage import check_storage, fetch_record, keep_record

TEXTS = {"b.txt": "The second.\n", "a/z.txt": "The first.\n", "a-b.txt": "Between them.\n", "empty.txt": ""}


def filled(folder: Path) -> Path:
    """A folder with text in every format, and with files that are not text."""
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "c.jsonl").write_text(json.dumps({"text": "In a line.", "id": 1}) + "\n")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "In a packed line."}).encode()))
    parquet.write_table(pyarrow.table({"text": ["In a row.", "In another."]}), folder / "a" / "e.parquet")
    (folder / ".hidden.txt").write_text("Not meant.")
    return folder


def upload(fs: Any, folder: Path, url: str) -> None:
    """Uploads every file of the folder, and an empty object such as a cloud console makes for a folder."""
    for file in folder.rglob("*"):
        if file.is_file():
            fs.pipe(f"{url}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    fs.pipe(f"{url}/a/made/", b"")


def text_of(corpus: Corpus) -> str:
    return "".join(corpus.documents())


def stream(tokens: TokenSet) -> Any:
    return tokens.read(0, tokens.num_tokens)


def fetched(cache: Path) -> dict[str, int]:
    """The copies in a cache, and the time when each was written."""
    found = (file for file in (cache / "downloads").iterdir() if not file.name.startswith("."))
    return {file.name.partition("-")[2]: file.stat().st_mtime_ns for file in found}


def test_a_folder_in_a_bucket_is_the_same_text_as_a_local_one(bucket: str, s3: Store, tmp_path: Path) -> None:
    folder = filled(tmp_path / "text")
    upload(s3.filesystem(), folder, f"{bucket}/text")
    here = open_corpus(str(folder), cache_dir=tmp_path / "one")
    for url in (f"{bucket}/text", f"{bucket}/text/"):
        there = open_corpus(url, cache_dir=tmp_path / "two")
        assert there.fingerprint == here.fingerprint
        assert text_of(there) == text_of(here)
    assert open_corpus(f"file://{folder}", cache_dir=tmp_path / "one").fingerprint == here.fingerprint


@pytest.mark.parametrize("pattern", ["b.txt", "*.txt", "a/*", "**/*.parquet", "**/*.txt", "?.jsonl", "*.gz"])
def test_an_object_or_a_pattern_in_a_bucket_works_like_a_local_one(
    bucket: str, s3: Store, tmp_path: Path, pattern: str
) -> None:
    folder = filled(tmp_path / "text")
    upload(s3.filesystem(), folder, f"{bucket}/text")
    here = open_corpus(f"{folder}/{pattern}", cache_dir=tmp_path / "one")
    there = open_corpus(f"{bucket}/text/{pattern}", cache_dir=tmp_path / "two")
    assert there.fingerprint == here.fingerprint


def test_an_object_is_fetched_once_and_again_when_it_changes(bucket: str, s3: Store, tmp_path: Path) -> None:
    fs, cache = s3.filesystem(), tmp_path / "cache"
    upload(fs, filled(tmp_path / "text"), bucket)
    begun = open_corpus(bucket, cache_dir=cache)
    before, text = fetched(cache), text_of(begun)
    open_corpus(bucket, cache_dir=cache)
    assert fetched(cache) == before, "what has not changed is fetched no more"

    fs.pipe(f"{bucket}/b.txt", b"Another second.\n")
    fs.pipe(f"{bucket}/new.txt", b"More.\n")
    changed = open_corpus(bucket, cache_dir=cache)
    assert text_of(changed) == text.replace("The second.", "Another second.") + "More.\n"
    assert {name for name, time in fetched(cache).items() if before.get(name) != time} == {"b.txt", "new.txt"}

    goes_on = open_corpus(bucket, cache_dir=cache, begun=begun.origins)
    assert (goes_on.fingerprint, text_of(goes_on)) == (begun.fingerprint, text)


def test_a_run_resumed_on_another_machine_refuses_a_changed_object(bucket: str, s3: Store, tmp_path: Path) -> None:
    fs = s3.filesystem()
    fs.pipe(f"{bucket}/a.txt", b"Once upon a time")
    begun = open_corpus(bucket, cache_dir=tmp_path / "one")
    assert text_of(open_corpus(bucket, cache_dir=tmp_path / "two", begun=begun.origins)) == "Once upon a time"
    fs.pipe(f"{bucket}/a.txt", b"Twice")
    with pytest.raises(CorpusError, match=rf"{bucket}/a.txt has changed since the run began; restore that text"):
        open_corpus(bucket, cache_dir=tmp_path / "three", begun=begun.origins)
    fs.rm(f"{bucket}/a.txt")
    with pytest.raises(CorpusError, match=f"there is nothing at '{bucket}/a.txt'"):
        open_corpus(bucket, cache_dir=tmp_path / "three", begun=begun.origins)
    assert not fetched(tmp_path / "three")


def test_a_machine_without_text_or_shards_makes_them_from_the_bucket(bucket: str, s3: Store, tmp_path: Path) -> None:
    upload(s3.filesystem(), filled(tmp_path / "text"), bucket)
    tokenizer, corpus = load_tokenizer("bytes", None), open_corpus(bucket, cache_dir=tmp_path / "one")
    made = prepare(corpus, tokenizer, tmp_path / "one")
    expected = stream(made)
    (tmp_path / "one").rename(tmp_path / "gone")
    handed = pickle.loads(pickle.dumps(corpus))  # as Ray hands it to a worker, whose cache may be elsewhere
    elsewhere = prepare(handed, tokenizer, tmp_path / "two")
    assert np.array_equal(stream(elsewhere), expected)
    assert elsewhere.fingerprint == made.fingerprint
    assert fetched(tmp_path / "two").keys() == fetched(tmp_path / "gone").keys() - {"empty.txt"}
    assert not (tmp_path / "one").exists()


def test_a_text_altered_in_transit_is_refused(bucket: str, s3: Store, tmp_path: Path) -> None:
    """The store reports the same version for different content."""
    s3.filesystem().pipe(f"{bucket}/a.txt", b"Once upon a time")
    corpus = open_corpus(bucket, cache_dir=tmp_path / "one")
    piece = corpus.within(tmp_path / "two").pieces[0]
    wrong = type(piece)(**vars(piece) | {"digest": "0" * 64})
    with pytest.raises(CorpusError, match="has changed since the run began"):
        list(wrong.documents())
    assert not fetched(tmp_path / "two")


# --- What cannot be read ----------------------------------------------------------------------------------------

Refused = Callable[..., str]


@pytest.fixture
def refused(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Runs the job, which must refuse its input. Returns its one line."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def call(*flags: str) -> str:
        assert run.main([*SMALL, *flags]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert not list((tmp_path / "home" / "runs").glob("*")), "something was begun"
        return one_error(said.err)

    return call


def test_a_missing_object_is_one_clear_line(bucket: str, s3: Store, refused: Refused) -> None:
    s3.filesystem().pipe(f"{bucket}/text/notes.txt", b"Here.")
    known = f"--data={bucket}/text"
    assert f"nothing at '{bucket}/text/note.txt'. Did you mean 'notes.txt'?" in refused(f"{known}/note.txt")
    assert f"nothing at '{bucket}/texts'. Did you mean 'text'?" in refused(f"--data={bucket}/texts")
    assert f"no object matches '{bucket}/text/*.parquet'" in refused(f"{known}/*.parquet")
    assert f"nothing at '{bucket}/nowhere/*'" in refused(f"--data={bucket}/nowhere/*")
    for lost in ("s3://no-such-bucket/text", "s3://no-such-bucket/*.txt"):
        assert f"nothing at '{lost}': The specified bucket does not exist" in refused(f"--data={lost}")
        assert f"nothing at '{lost}'" in refused(known, f"--val-data={lost}")
    assert "there is no file" in refused("--data=file:///no/such/file")


@pytest.mark.usefixtures("no_gcsfs")
def test_a_forbidden_or_unreadable_object_is_one_clear_line(bucket: str, s3: Store, refused: Refused) -> None:
    fs = s3.filesystem()
    fs.pipe(f"{bucket}/text/a.txt", b"Here.")
    with s3.closed():
        for url in (f"{bucket}/text", f"{bucket}/text/*.txt"):
            assert f"text at '{url}' cannot be read: The AWS Access Key Id" in refused(f"--data={url}")
    fs.pipe(f"{bucket}/cut.txt.gz", gzip.compress(b"Here." * 100)[:-9])
    assert f"{bucket}/cut.txt.gz is not a whole gzip file" in refused(f"--data={bucket}/cut.txt.gz")
    fs.pipe(f"{bucket}/empty/a.txt", b"")
    assert f"{bucket}/empty holds no text" in refused(f"--data={bucket}/empty")
    assert "is a chain of URLs" in refused(f"--data=zip://a.txt::{bucket}/a.zip")
    assert "'gopher://host/text' cannot be opened" in refused("--data=gopher://host/text")
    assert "pip install -e '.[gcs]'" in refused("--data=gs://bucket/text")


# --- Google Cloud Storage ---------------------------------------------------------------------------------------


@pytest.fixture
def google(gcs: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of a folder that only this test uses."""
    monkeypatch.setenv("GPT_FOUNDRY_HOME", str(tmp_path / "home"))
    return f"gs://foundry/{tmp_path.name}"


def test_text_shards_and_packages_may_be_in_google_cloud_storage(google: str, tmp_path: Path) -> None:
    import gcsfs

    fs = gcsfs.GCSFileSystem()
    upload(fs, filled(tmp_path / "text"), f"{google}/text")
    here = open_corpus(str(tmp_path / "text"), cache_dir=tmp_path / "one")
    there = open_corpus(f"{google}/text", cache_dir=tmp_path / "two")
    assert there.fingerprint == here.fingerprint
    fs.pipe(f"{google}/text/b.txt", b"Another second.\n")
    assert "Another second." in text_of(open_corpus(f"{google}/text", cache_dir=tmp_path / "two"))
    with pytest.raises(CorpusError, match="has changed since the run began"):
        open_corpus(f"{google}/text", cache_dir=tmp_path / "three", begun=there.origins)
    with pytest.raises(CorpusError, match="there is nothing at 'gs://no-such-bucket/text'"):
        open_corpus("gs://no-such-bucket/text", cache_dir=tmp_path)

    tokenizer = load_tokenizer("bytes", None)
    made = stream(prepare(there, tokenizer, tmp_path / "two", store=f"{google}/cache"))
    (tmp_path / "two").rename(tmp_path / "gone")
    assert np.array_equal(stream(prepare(there, tokenizer, tmp_path / "four", store=f"{google}/cache")), made)
    assert not (tmp_path / "four" / "downloads").exists(), "shards come from the store"

    package = small_package(tmp_path / "package")
    fs.put(str(package.path), f"{google}/package", recursive=True)
    assert open_package(resolve(f"{google}/package")).info == package.info


def test_everything_needed_to_resume_a_run_may_be_in_google_cloud_storage(
    google: str, gcs: dict[str, str], tmp_path: Path
) -> None:
    """Ray's own client, which keeps the checkpoints, is told in the URL where the emulator is."""
    host = gcs["STORAGE_EMULATOR_HOST"].removeprefix("http://").replace(":", "%3A")
    url = f"{google.replace('gs://', 'gs://anonymous@')}/runs?scheme=http&endpoint_override={host}"
    check_storage(url)
    here, there = tmp_path / "here" / "first", tmp_path / "there" / "first"
    for folder in (here, there):
        folder.mkdir(parents=True)
    (here / "config.yaml").write_text("data: builtin\n")
    (here / "run.json").write_text("{}")
    keep_record(url, here)
    fetch_record(url, there)
    assert {file.name: file.read_text() for file in there.iterdir()} == {
        file.name: file.read_text() for file in here.iterdir()
    }
