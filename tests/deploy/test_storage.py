"""Checkpoints, packages and token shards at a URL, on a real S3 server."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcore.config import ModelConfig
from gptcore.errors import CorpusError, HubError, PackageError
from gptcore.hub import resolve
from gptcore.model import GPT
from gptcore.package import Package, open_package, save_package
from gptcore.tokenizer import load_tokenizer
from serve_app.feedback import FeedbackLog
from serve_app.settings import load_settings
from tests.deploy.conftest import Store
from tests.refusals import one_error
from tests.serve_app.running import running
from tests.system.conftest import ROOT, SMALL, environment
from train_job.config import build_config
from train_job.data.corpus import open_corpus, split
from train_job.data.inputs import prepare_inputs, shard_store
from train_job.data.shards import TokenSet, prepare
from train_job.session.history import History
from train_job.session.lock import Claim, Taken, claimed, this_process
from train_job.training.storage import check_storage, fetch_record, keep_record


def small_package(folder: Path, seed: int = 0) -> Package:
    import torch

    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=320, hidden_size=32, num_layers=1, num_heads=2, context_length=64)
    return save_package(folder, config, GPT(config).state_dict(), load_tokenizer("bytes", None), {})


# --- Packages ---------------------------------------------------------------------------------------------------


def test_a_package_at_a_url_is_fetched_once_and_again_when_it_changes(bucket: str, s3: Store, tmp_path: Path) -> None:
    fs, url = s3.filesystem(), f"{bucket}/package"
    package = small_package(tmp_path / "package")
    fs.put(str(package.path), url, recursive=True)
    fs.pipe(f"{url}/optimizer.pt", b"not a model's business")
    first = resolve(url)
    opened = open_package(first)
    assert (opened.config, opened.info) == (package.config, package.info)
    assert first.is_relative_to(tmp_path / "home" / ".cache" / "packages")
    assert {file.name for file in first.iterdir()} == {file.name for file in package.path.iterdir()}
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve(url) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before

    fs.put(str(small_package(tmp_path / "other", seed=1).path) + "/", url + "/", recursive=True)
    second = resolve(url)
    assert second != first
    assert open_package(second).info["files"] != package.info["files"]


def test_a_service_serves_a_package_at_a_url_and_leaves_no_copy(bucket: str, s3: Store, tmp_path: Path) -> None:
    package = small_package(tmp_path / "package")
    s3.filesystem().put(str(package.path), f"{bucket}/package", recursive=True)
    given = {"model": f"{bucket}/package", "slots": 2, "threads": 1, "backend": "torch", "dtype": "float32"}
    with running(load_settings(given)) as service:
        body = json.dumps({"prompt": "a", "max_new_tokens": 4, "ignore_eos": True}).encode()
        with urllib.request.urlopen(f"{service.url}/generate", data=body) as answer:
            assert json.load(answer)["version"]
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_package_altered_in_the_store_is_refused(bucket: str, s3: Store, tmp_path: Path) -> None:
    package = small_package(tmp_path / "package")
    weights = package.path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    s3.filesystem().put(str(package.path), f"{bucket}/package", recursive=True)
    with pytest.raises(PackageError, match=r"model\.safetensors was altered"):
        open_package(resolve(f"{bucket}/package"))


@pytest.mark.usefixtures("no_gcsfs")
def test_a_url_without_a_package_is_one_clear_line(bucket: str, s3: Store, tmp_path: Path) -> None:
    s3.filesystem().pipe(f"{bucket}/notes/a.txt", b"a")
    for url in (f"{bucket}/nothing", f"{bucket}/notes", "s3://no-such-bucket/package"):
        with pytest.raises(HubError, match="there is no model at") as caught:
            resolve(url)
        assert repr(url) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(HubError, match=r"'gopher://host/package' cannot be opened: .*gopher"):
        resolve("gopher://host/package")
    with pytest.raises(HubError, match=r"cannot be opened: .*gcsfs"):
        resolve("gs://bucket/package")
    assert not (tmp_path / "home").exists()


# --- Token shards -----------------------------------------------------------------------------------------------


def stream(tokens: TokenSet) -> Any:
    return tokens.read(0, tokens.num_tokens)


def test_a_machine_without_the_text_gets_its_shards_from_the_store(
    bucket: str, s3: Store, text_file: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(text_file.read_bytes())
    tokenizer, corpus = load_tokenizer("bytes", None), open_corpus(str(text))
    made = prepare(corpus, tokenizer, tmp_path / "one", store=f"{bucket}/cache")
    stored = s3.files(f"{bucket.removeprefix('s3://')}/cache/shards")
    assert sorted(stored) == sorted(file.name for file in (tmp_path / "one" / "shards").iterdir())

    text.unlink()
    fetched = prepare(corpus, tokenizer, tmp_path / "two", store=f"{bucket}/cache")
    assert np.array_equal(stream(fetched), stream(made))
    assert fetched.fingerprint == made.fingerprint
    assert fetched.shards[0].path.startswith(str(tmp_path / "two"))


def test_a_truncated_shard_in_the_store_is_made_again(bucket: str, s3: Store, text_file: Path, tmp_path: Path) -> None:
    tokenizer, corpus = load_tokenizer("bytes", None), open_corpus(str(text_file))
    made = prepare(corpus, tokenizer, tmp_path / "one", store=f"{bucket}/cache")
    fs, name = s3.filesystem(), Path(made.shards[0].path).name
    fs.pipe(f"{bucket}/cache/shards/{name}", b"cut")
    again = prepare(corpus, tokenizer, tmp_path / "two", store=f"{bucket}/cache")
    assert np.array_equal(stream(again), stream(made))
    assert fs.size(f"{bucket}/cache/shards/{name}") == Path(made.shards[0].path).stat().st_size


def test_a_runs_shards_go_to_a_cache_dir_at_a_url(bucket: str, s3: Store, text_file: Path, tmp_path: Path) -> None:
    config = build_config(
        dict(data=str(text_file), tokenizer="bytes", context_length=32, batch_size=4, cache_dir=f"{bucket}/cache")
    )
    assert shard_store(config) == f"{bucket}/cache"
    inputs = prepare_inputs(config)
    corpora = split(open_corpus(str(text_file)), config.val_fraction)
    assert [c.fingerprint for c in corpora] == [inputs.train_corpus.fingerprint, inputs.validation_corpus.fingerprint]
    paths = [Path(shard.path) for tokens in (inputs.train, inputs.validation) for shard in tokens.shards]
    assert all(path.is_relative_to(tmp_path / "home" / ".cache") for path in paths)
    stored = s3.files(f"{bucket.removeprefix('s3://')}/cache/shards")
    assert {path.name for path in paths} <= set(stored)


def test_an_unusable_store_is_named_before_training(bucket: str, text_file: Path, tmp_path: Path) -> None:
    corpus, tokenizer = open_corpus(str(text_file)), load_tokenizer("bytes", None)
    with pytest.raises(CorpusError, match="cannot be stored at s3://no-such-bucket/cache"):
        prepare(corpus, tokenizer, tmp_path, store="s3://no-such-bucket/cache")


# --- Runs -------------------------------------------------------------------------------------------------------


def run_job(s3: Store, home: Path, *flags: str, **env: str) -> tuple[int, str]:
    """(exit code, output) of `python train_job/run.py` with its own Ray."""
    done = subprocess.run(
        [sys.executable, "train_job/run.py", *flags],
        cwd=ROOT,
        env=environment(home, RAY_ADDRESS="local", **s3.env, **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def test_a_missing_bucket_ends_the_job_with_one_line(s3: Store, text_file: Path, tmp_path: Path) -> None:
    flags = [*SMALL, f"--data={text_file}", "--name=lost", "--storage-path=s3://no-such-bucket/runs"]
    code, output = run_job(s3, tmp_path, *flags)
    assert code == 2, output
    assert one_error(output).startswith("error: storage_path 's3://no-such-bucket/runs' cannot be reached: ")
    assert not list(tmp_path.iterdir()), "something was begun"


@pytest.mark.parametrize("scheme", ["s3", "fsspec+s3"])
def test_everything_needed_to_resume_a_run_is_kept_beside_its_checkpoints(
    bucket: str, s3: Store, tmp_path: Path, scheme: str
) -> None:
    url = bucket.replace("s3", scheme, 1) + "/runs"
    check_storage(url)
    for folder in ("here/first", "there/first", "there/second"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "here" / "first" / "config.yaml").write_text("data: builtin\n")
    (tmp_path / "here" / "first" / "run.json").write_text("{}")
    keep_record(url, tmp_path / "here" / "first")
    (tmp_path / "there" / "first" / "run.json").write_text("its own")
    fetch_record(url, tmp_path / "there" / "first")
    assert (tmp_path / "there" / "first" / "config.yaml").read_text() == "data: builtin\n"
    assert (tmp_path / "there" / "first" / "run.json").read_text() == "its own"
    fetch_record(url, tmp_path / "there" / "second")
    assert not list((tmp_path / "there" / "second").iterdir())


@pytest.mark.parametrize("scheme", ["s3", "fsspec+s3"])
def test_a_run_in_a_bucket_has_one_owner(bucket: str, s3: Store, scheme: str) -> None:
    url, us, them = bucket.replace("s3", scheme, 1) + "/claimed", this_process(), this_process()
    check_storage(url)
    with claimed(url, "one", us, {}):
        with pytest.raises(Taken, match=f"'one' is being run by process {us['pid']}"), claimed(url, "one", them, {}):
            pass
        with claimed(url, "two", them, {}):
            pass
        with pytest.raises(Taken), claimed(f"{url}/one", "one-01", them, {}):  # one of a sweep's
            pass
    with claimed(url, "one", them, {}):
        pass
    Claim(url, "one", us)._write(held=True)
    with claimed(url, "one", them, before=us):  # whose lock here is ours now
        pass
    assert not [name for name in s3.files(url.partition("://")[2]) if "claim" in name]


@pytest.mark.slow
def test_a_run_in_a_bucket_resumes_on_another_machine(s3: Store, text_file: Path, tmp_path: Path) -> None:
    """The text is in a bucket too. The run ignores files that were added to the bucket later."""
    s3.filesystem().pipe("mlflow/text/rhyme.txt", text_file.read_bytes())
    tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    storage = "--storage-path=s3://mlflow/runs"
    settings = [*SMALL, "--max-steps=20", "--schedule=linear", "--data=s3://mlflow/text", storage]
    settings += ["--cache-dir=s3://mlflow/cache"]
    code, output = run_job(s3, tmp_path / "here", *settings, "--name=moved", **tracking)
    assert code == 0, output
    kept = s3.files("mlflow/runs/moved")
    assert {"config.yaml", "run.json"} <= set(kept)
    assert len(s3.files("mlflow/cache/shards")) == 4, "a .bin and a .json for either split"
    assert [name for name in kept if name.startswith("checkpoint_") and name.endswith(".safetensors")]
    assert not list((tmp_path / "here" / "runs" / "moved").glob("checkpoint_*"))

    code, output = run_job(s3, tmp_path / "there", *settings, "--name=moved", **tracking)
    assert code == 2, output
    assert "there is a run 'moved' already" in output, "it would have gone on with the other machine's checkpoint"
    s3.filesystem().pipe("mlflow/text/later.txt", b"Not of this run.\n" * 100)
    code, output = run_job(s3, tmp_path / "there", "--resume=moved", storage, "--max-steps=40", **tracking)
    assert code == 0, output
    assert "from step 20" in output
    from mlflow import MlflowClient

    client = MlflowClient(tracking["MLFLOW_TRACKING_URI"])
    run_id = json.loads((tmp_path / "there" / "runs" / "moved" / "run.json").read_text())["run_id"]
    assert [point.step for point in client.get_metric_history(run_id, "val/loss")] == [0, 20, 40]
    open_package(tmp_path / "there" / "runs" / "moved" / "package")
    here, there = (History(tmp_path / home / "runs" / "moved" / "history.jsonl") for home in ("here", "there"))
    assert [row["step"] for row in there.rows if "train_loss" in row] == list(range(5, 41, 5))
    assert [row["step"] for row in there.rows if "val_loss" in row] == [0, 20, 40]
    assert all(row in there.rows for row in here.rows), "the loss curve begins where the run began"


def test_votes_on_answers_go_to_a_bucket(bucket: str, s3: Store) -> None:
    log = FeedbackLog(f"{bucket}/votes", 10_000_000)
    for number in ("1", "2"):
        log.add({"id": number, "answer": "x", "messages": [{"role": "user", "content": "?"}, {"role": "assistant"}]})
    folder = f"{bucket.removeprefix('s3://')}/votes"
    (file,) = s3.files(folder)
    lines = s3.filesystem().cat_file(f"{folder}/{file}").splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["1", "2"]
