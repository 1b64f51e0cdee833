"""train_job.tracking.registry, with real packages and MLflow's own loader and scoring server."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from gptcore.config import ModelConfig
from gptcore.errors import ConfigError, HubError
from gptcore.model import GPT
from gptcore.package import Package, open_package, save_package
from gptcore.sampling import SamplingParams, generate_text
from gptcore.tokenizer import load_tokenizer
from tests.ports import free_port
from tests.waiting import await_server, is_up
from train_job.tracking import runs as tracking
from train_job.tracking.registry import (
    Candidate,
    Champion,
    Published,
    Validation,
    _decide_and_promote,
    decide,
    pin,
    publish,
)

PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy", ".npz", ".pyc"}


def make_package(folder: Path, steps: int = 3) -> Package:
    """A new model. Its head is initialised with zeros, so it needs log2(vocabulary) bits per token."""
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
    assert {param.name for param in model.metadata.signature.params} == {f.name for f in fields(SamplingParams)}
    wanted: dict[str, Any] = dict(
        max_new_tokens=9, seed=1, min_p=0.9, repetition_penalty=1.5, presence_penalty=1.0, ignore_eos=True
    )
    wanted |= dict(stop=["q", "zz"], stop_token_ids=[7], logprobs=2)
    ours = generate_text(package.load_model(), package.tokenizer, "a", SamplingParams(**wanted))
    assert model.predict(prompts, params=wanted)[0] == ours != texts[0]
    assert model.predict({"prompt": "b"}, params={"max_new_tokens": 5, "seed": 1}) == texts[1:]
    assert all(isinstance(text, str) for text in texts)


def test_a_version_records_its_score_its_origin_and_the_reason_for_the_decision(
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


def test_a_logged_model_contains_the_package_unchanged_and_no_pickle(
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


def test_the_figures_of_the_last_step_are_linked_to_the_model_and_logged_once(uri: str, package: Package):
    run_id = tracking.start_run(uri, {})
    for step, loss in ((10, 3.0), (20, 2.0)):
        client(uri).log_metric(run_id, "val/loss", loss, step=step)
    publish(uri, run_id, package, validation(), name="figures", bits_per_byte=1.0, step=20)
    source = client(uri).get_model_version("figures", "1").source
    logged = client(uri).get_logged_model(source.removeprefix("models:/"))
    assert [(m.key, m.value) for m in logged.metrics] == [("val/loss", 2.0)]
    assert [m.value for m in client(uri).get_metric_history(run_id, "val/loss")] == [3.0, 2.0]


def publish_anew(uri: str, package: Package, text: Validation, **more: Any) -> Published:
    """Publishes a package from its own run."""
    return publish(uri, tracking.start_run(uri, {}), package, text, **more)


def test_a_losing_version_is_kept_but_does_not_take_the_alias(uri: str, package: Package):
    publish_anew(uri, package, validation(), name="loser", bits_per_byte=1.5)
    same_bytes = Validation("f1", unasked)
    worse = publish_anew(uri, package, same_bytes, name="loser", bits_per_byte=1.6)
    assert (worse.version, worse.promoted) == ("2", False)
    assert worse.reason == "1.6000 bits per byte is no better than the 1.5000 of champion version 1 on the same text"
    assert client(uri).get_model_version("loser", "2").tags["promotion_reason"] == worse.reason
    assert champion_of(uri, "loser") == "1"
    better = publish_anew(uri, package, same_bytes, name="loser", bits_per_byte=1.4)
    assert better.promoted
    assert champion_of(uri, "loser") == "3"


def test_promote_always_and_never_do_what_they_say(uri: str, package: Package):
    first = publish_anew(uri, package, validation(), name="modes", promote="never", bits_per_byte=1.0)
    assert not first.promoted
    assert publish_anew(uri, package, validation(), name="modes", promote="always", bits_per_byte=9.0).promoted
    assert champion_of(uri, "modes") == "2"
    never = publish_anew(uri, package, validation(), name="modes", promote="never", bits_per_byte=0.1)
    assert (never.promoted, never.reason) == (False, "promotion was set to 'never' (0.1000 bits per byte)")
    assert champion_of(uri, "modes") == "2"


def test_a_champion_evaluated_on_another_text_is_evaluated_again_on_ours(uri: str, package: Package, tmp_path: Path):
    publish_anew(uri, package, validation("other text"), name="rejudged", bits_per_byte=0.001)
    newcomer = make_package(tmp_path / "newcomer", steps=9)

    def on_our_text(of_newcomer: float) -> Validation:
        figures = {3: 1.2, 9: of_newcomer}
        return Validation("f1", lambda judged: figures[judged.info["training"]["steps"]])

    lost = publish_anew(uri, newcomer, on_our_text(1.3), name="rejudged", bits_per_byte=0.002)
    assert not lost.promoted, "both are judged alike, whatever was recorded elsewhere"
    assert "1.2000 of champion version 1" in lost.reason
    assert publish_anew(uri, newcomer, on_our_text(1.1), name="rejudged", bits_per_byte=1.1).promoted


def test_a_run_registers_the_same_weights_only_once(uri: str, run_id: str, package: Package):
    def again(promote: str) -> tuple[str, bool, bool]:
        done = publish(uri, run_id, package, validation(), name="once", promote=promote, bits_per_byte=2.0)
        return done.version, done.new, done.promoted

    publish_anew(uri, package, validation(), name="once", bits_per_byte=1.0)
    assert again("if-better") == ("2", True, False)
    assert again("if-better") == ("2", False, False)
    assert again("always") == ("2", False, True)
    assert again("if-better") == ("2", False, True), "a champion does not have to beat itself"
    assert len(client(uri).search_model_versions("name = 'once'")) == 2


def test_publishing_a_version_again_keeps_the_first_decision(uri: str, run_id: str, package: Package):
    first = publish(uri, run_id, package, validation(), name="stands", bits_per_byte=2.0)
    publish_anew(uri, package, validation(), name="stands", bits_per_byte=1.0)
    again = publish(uri, run_id, package, validation(), name="stands", bits_per_byte=2.0)
    assert (again.version, again.promoted, again.reason) == ("1", True, first.reason)
    assert client(uri).get_model_version("stands", "1").tags["promoted"] == "true"
    assert champion_of(uri, "stands") == "2"


def test_an_interrupted_publication_is_finished_by_the_next_one(
    uri: str, run_id: str, package: Package, monkeypatch: pytest.MonkeyPatch
):
    from mlflow import MlflowClient

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for step_of_it in ("update_model_version", "set_registered_model_alias", "set_model_version_tag"):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, step_of_it, stop)
            with pytest.raises(KeyboardInterrupt):
                publish(uri, run_id, package, validation(), name="halves", bits_per_byte=1.0)
    published = publish(uri, run_id, package, validation(), name="halves", bits_per_byte=1.0)
    assert (published.version, published.promoted) == ("1", True)
    [version] = client(uri).search_model_versions("name = 'halves'")
    assert version.description
    assert version.tags["promoted"] == "true"
    assert champion_of(uri, "halves") == "1"


# --- two jobs at once -----------------------------------------------------------------------------------------------


def test_a_champion_that_another_job_promotes_meanwhile_is_the_one_to_beat(uri: str, package: Package, tmp_path: Path):
    publish_anew(uri, package, validation("other text"), name="overtaken", bits_per_byte=3.0)
    faster = [1.3]

    def judge_slowly(judged: Package) -> float:
        while faster:  # another job ends while we judge the champion that there was
            publish_anew(uri, package, validation("f1"), name="overtaken", promote="always", bits_per_byte=faster.pop())
        return {3: 3.0, 9: 1.4}[judged.info["training"]["steps"]]

    newcomer = make_package(tmp_path / "newcomer", steps=9)
    ours = publish_anew(uri, newcomer, Validation("f1", judge_slowly), name="overtaken", bits_per_byte=1.4)
    assert not ours.promoted
    assert ours.reason == "1.4000 bits per byte is no better than the 1.3000 of champion version 3 on the same text"
    assert champion_of(uri, "overtaken") == "3"


def rivals(uri: str, name: str, package: Package, figures: list[float]) -> list[Candidate]:
    """Registered versions, each with a score on the same text. None is champion yet."""
    client(uri).create_registered_model(name)
    candidates = []
    for bits in figures:
        tags = {"bits_per_byte": repr(bits), "validation_fingerprint": "f1"}
        version = client(uri).create_model_version(name, package.path.as_uri(), tags=tags).version
        candidates.append(Candidate(name, str(version), package, bits))
    return candidates


def test_the_best_of_many_jobs_that_end_at_the_same_time_is_champion(uri: str, package: Package):
    figures = [1.7, 1.2, 1.9, 1.4, 1.1, 1.6, 1.3, 1.8]
    candidates = rivals(uri, "crowd", package, figures)
    together = threading.Barrier(len(candidates))

    def ask(candidate: Candidate) -> None:
        together.wait()
        _decide_and_promote(client(uri), uri, "if-better", candidate, Validation("f1", unasked))

    with ThreadPoolExecutor(len(candidates)) as pool:
        list(pool.map(ask, candidates))
    assert champion_of(uri, "crowd") == candidates[figures.index(1.1)].version


def test_on_a_server_a_better_model_takes_the_alias_back_from_a_worse_one_promoted_at_the_same_time(
    uri: str, package: Package
):
    ours, theirs = rivals(uri, "server", package, [1.1, 1.2])

    class Overtaken:
        """A client, with another job that sets the alias once, directly after this client did."""

        def __init__(self) -> None:
            self.inner, self.moves = client(uri), [theirs.version]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
            self.inner.set_registered_model_alias(name, alias, version)
            while self.moves:
                self.inner.set_registered_model_alias(name, alias, self.moves.pop())

    decision = _decide_and_promote(Overtaken(), "http://a.server", "if-better", ours, Validation("f1", unasked))
    assert decision.promote
    assert "better than the 1.2000 of champion version 2" in decision.reason
    assert champion_of(uri, "server") == ours.version


def test_an_unreadable_champion_stays_champion(uri: str, run_id: str, package: Package):
    import mlflow

    publish(uri, run_id, package, validation("other text"), name="damaged", bits_per_byte=1.0)
    folder = Path(mlflow.artifacts.download_artifacts("models:/damaged/1", tracking_uri=uri))
    next(folder.rglob("model.safetensors")).write_bytes(b"cut short")
    published = publish_anew(uri, package, validation(), name="damaged", bits_per_byte=0.5)
    assert not published.promoted
    assert "champion version 1 cannot be evaluated" in published.reason
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
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/served@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with (tmp_path / "serve.log").open("wb") as output:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        await_server(server, lambda: is_up(f"http://127.0.0.1:{port}/ping"), tmp_path / "serve.log", 300)
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
