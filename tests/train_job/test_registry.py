"""Claims about train_job.registry, with real packages and MLflow's own loader and scoring server."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from gptcore.config import ModelConfig
from gptcore.errors import ConfigError, HubError
from gptcore.model import GPT
from gptcore.package import Package, open_package, save_package
from gptcore.tokenizer import load_tokenizer
from train_job import tracking
from train_job.registry import Champion, Validation, decide, pin, publish

PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy", ".npz", ".pyc"}


def make_package(folder: Path, steps: int = 3) -> Package:
    """A random model; its init_weights ends in a head of zeros, so it needs log2(vocabulary) bits per token."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("bytes", None)
    config = ModelConfig(vocab_size=320, hidden_size=32, num_layers=1, num_heads=2, context_length=64)
    return save_package(folder, config, GPT(config).state_dict(), tokenizer, {"steps": steps})


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"
    mlflow.set_tracking_uri(None)
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return make_package(tmp_path_factory.mktemp("package") / "package")


@pytest.fixture(scope="module")
def run_id(uri: str) -> str:
    data = tracking.DatasetUse("train", "builtin", "builtin", "fe" * 32, 900, 300)
    return tracking.start_run(uri, {"preset": "quick"}, datasets=[data], tags={"parent": "models:/gpt/7"})


def client(uri: str):
    from mlflow import MlflowClient

    return MlflowClient(uri)


def validation(fingerprint: str = "f1", bits: float = 1.5) -> Validation:
    """A text on which every model scores `bits`."""
    return Validation(fingerprint, lambda package: bits)


def unasked(package: Package) -> float:
    raise AssertionError("the recorded figure would have done")


def champion_of(uri: str, name: str) -> str:
    return str(client(uri).get_model_version_by_alias(name, "champion").version)


def test_the_first_version_becomes_champion_and_predicts(uri: str, run_id: str, package: Package):
    import mlflow

    published = publish(uri, run_id, package, validation(), name="first")
    assert (published.version, published.promoted) == ("1", True)
    assert "there was no champion yet" in published.reason
    assert published.bits_per_byte == 1.5
    model = mlflow.pyfunc.load_model("models:/first@champion")
    prompts = pd.DataFrame({"prompt": ["a", "b"]})
    texts = model.predict(prompts, params={"max_new_tokens": 5, "seed": 1})
    assert len(texts) == 2
    assert texts == model.predict(prompts, params={"max_new_tokens": 5, "seed": 1})
    assert model.predict({"prompt": "b"}, params={"max_new_tokens": 5, "seed": 1}) == texts[1:]
    assert all(isinstance(text, str) for text in texts)


def test_a_version_says_what_it_scored_where_it_comes_from_and_why_it_was_judged_so(
    uri: str, run_id: str, package: Package
):
    publish(uri, run_id, package, validation(), name="told", bits_per_byte=1.25)
    version = client(uri).get_model_version("told", "1")
    assert version.run_id == run_id
    assert "qwen3" in version.description
    wanted = {"bits_per_byte": "1.25", "validation_fingerprint": "f1", "data": "builtin", "parent": "models:/gpt/7"}
    wanted |= {"data_fingerprint": "fe" * 32, "promoted": "true"}
    assert version.tags.items() >= wanted.items()
    assert "1.2500 bits per byte" in version.tags["promotion_reason"]


def test_a_logged_model_holds_the_package_as_it_was_and_no_pickle(
    uri: str, run_id: str, package: Package, tmp_path: Path
):
    import mlflow

    publish(uri, run_id, package, validation(), name="files", bits_per_byte=1.0)
    folder = Path(mlflow.artifacts.download_artifacts("models:/files/1", dst_path=str(tmp_path), tracking_uri=uri))
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert not [file for file in files if file.suffix in PICKLES]
    for file in files:
        head = file.read_bytes()[:2]
        assert head[:1] != b"\x80" or file.suffix == ".safetensors", f"{file} begins like a pickle"
        assert head != b"PK", f"{file} is an archive"
    model = yaml.safe_load((folder / "MLmodel").read_text())
    assert model["signature"]["inputs"]
    assert model["saved_input_example_info"]
    logged = open_package(folder / model["flavors"]["python_function"]["data"])  # verifies every sha256
    assert logged.info == package.info
    requirements = (folder / "requirements.txt").read_text()
    assert f"torch=={torch.__version__.partition('+')[0]}" in requirements
    assert "cloudpickle" not in requirements


def test_the_figures_of_the_last_step_stand_beside_the_model_and_are_not_logged_twice(uri: str, package: Package):
    run_id = tracking.start_run(uri, {})
    for step, loss in ((10, 3.0), (20, 2.0)):
        client(uri).log_metric(run_id, "val/loss", loss, step=step)
    publish(uri, run_id, package, validation(), name="figures", bits_per_byte=1.0, step=20)
    source = client(uri).get_model_version("figures", "1").source
    logged = client(uri).get_logged_model(source.removeprefix("models:/"))
    assert [(m.key, m.value) for m in logged.metrics] == [("val/loss", 2.0)]
    assert [m.value for m in client(uri).get_metric_history(run_id, "val/loss")] == [3.0, 2.0]


def test_a_losing_version_is_kept_but_does_not_take_the_alias(uri: str, run_id: str, package: Package):
    publish(uri, run_id, package, validation(), name="loser", bits_per_byte=1.5)
    same_bytes = Validation("f1", unasked)
    worse = publish(uri, run_id, package, same_bytes, name="loser", bits_per_byte=1.6)
    assert (worse.version, worse.promoted) == ("2", False)
    assert worse.reason == "1.6000 bits per byte is no better than the 1.5000 of champion version 1 on the same text"
    assert client(uri).get_model_version("loser", "2").tags["promotion_reason"] == worse.reason
    assert champion_of(uri, "loser") == "1"
    better = publish(uri, run_id, package, same_bytes, name="loser", bits_per_byte=1.4)
    assert better.promoted
    assert champion_of(uri, "loser") == "3"


def test_always_and_never_do_as_they_say(uri: str, run_id: str, package: Package):
    first = publish(uri, run_id, package, validation(), name="modes", promote="never", bits_per_byte=1.0)
    assert not first.promoted
    assert publish(uri, run_id, package, validation(), name="modes", promote="always", bits_per_byte=9.0).promoted
    assert champion_of(uri, "modes") == "2"
    never = publish(uri, run_id, package, validation(), name="modes", promote="never", bits_per_byte=0.1)
    assert (never.promoted, never.reason) == (False, "promotion was set to 'never' (0.1000 bits per byte)")
    assert champion_of(uri, "modes") == "2"


def test_a_champion_judged_on_other_bytes_is_judged_again_on_ours(
    uri: str, run_id: str, package: Package, tmp_path: Path
):
    publish(uri, run_id, package, validation("other text"), name="rejudged", bits_per_byte=0.001)
    newcomer = make_package(tmp_path / "newcomer", steps=9)

    def on_our_text(of_newcomer: float) -> Validation:
        figures = {3: 1.2, 9: of_newcomer}
        return Validation("f1", lambda judged: figures[judged.info["training"]["steps"]])

    lost = publish(uri, run_id, newcomer, on_our_text(1.3), name="rejudged", bits_per_byte=0.002)
    assert not lost.promoted, "both are judged alike, whatever was recorded elsewhere"
    assert "1.2000 of champion version 1" in lost.reason
    assert publish(uri, run_id, newcomer, on_our_text(1.1), name="rejudged", bits_per_byte=1.1).promoted


def test_a_champion_that_cannot_be_read_keeps_its_place(uri: str, run_id: str, package: Package):
    import mlflow

    publish(uri, run_id, package, validation("other text"), name="damaged", bits_per_byte=1.0)
    folder = Path(mlflow.artifacts.download_artifacts("models:/damaged/1", tracking_uri=uri))
    next(folder.rglob("model.safetensors")).write_bytes(b"cut short")
    published = publish(uri, run_id, package, validation(), name="damaged", bits_per_byte=0.5)
    assert not published.promoted
    assert "champion version 1 cannot be judged" in published.reason
    assert "model.safetensors" in published.reason


def test_a_version_is_pinned_by_its_number(uri: str, run_id: str, package: Package):
    publish(uri, run_id, package, validation(), name="pinned", bits_per_byte=1.0)
    assert pin("models:/pinned@champion", uri) == "models:/pinned/1"
    for unchanged in ("models:/pinned/1", "runs:/abc/model", "some/folder@x", "hf:org/name"):
        assert pin(unchanged, uri) == unchanged
    with pytest.raises(HubError, match="no model 'pinned' with the alias 'champoin'"):
        pin("models:/pinned@champoin", uri)


def test_the_gate_is_a_pure_function():
    champion = Champion("4", 2.0)
    assert decide("if-better", 1.9, champion).promote
    assert not decide("if-better", 2.0, champion).promote
    assert not decide("if-better", math.nan, None).promote
    assert not decide("if-better", math.inf, None).promote
    assert decide("always", 3.0, champion).promote
    assert not decide("never", 1.0, None).promote
    with pytest.raises(ConfigError, match="Did you mean 'if-better'"):
        decide("if-beter", 1.0, None)


@pytest.mark.slow
def test_mlflow_serves_the_champion_over_http(uri: str, run_id: str, package: Package, tmp_path: Path):
    publish(uri, run_id, package, validation(), name="served", bits_per_byte=1.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/served@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with (tmp_path / "serve.log").open("wb") as output:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "serve.log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "serve.log").read_text()
                time.sleep(0.1)
        body = {"dataframe_split": {"columns": ["prompt"], "data": [["the cat"]]}}
        body |= {"params": {"max_new_tokens": 4, "seed": 7}}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        assert len(answer["predictions"]) == 1
        assert isinstance(answer["predictions"][0], str)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
