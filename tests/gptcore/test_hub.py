"""A name resolves to a package folder, wherever it is stored, or gives one message about what is wrong."""

import shutil
import sys
import time
from pathlib import Path

import pytest

from gptcore.errors import HubError
from gptcore.hub import resolve
from gptcore.package import Package, open_package
from tests.ports import free_port


def test_a_folder_resolves_to_itself(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(package.path)) == package.path
    monkeypatch.chdir(package.path.parent)
    assert resolve(package.path.name) == package.path


def test_an_unknown_name_says_what_is_expected_and_what_is_similar(package: Package) -> None:
    with pytest.raises(HubError, match=r"models:/NAME@ALIAS.* Did you mean .*/package'"):
        resolve(str(package.path) + "s")
    with pytest.raises(HubError, match=r"README\.md' is a file"):
        resolve(str(package.path / "README.md"))
    with pytest.raises(HubError, match="'~nobody-of-this-name/x' starts with an unknown home folder"):
        resolve("~nobody-of-this-name/x")


def test_hugging_faces_cache_is_used_without_its_client(
    package: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with pytest.raises(HubError, match="pip install huggingface-hub"):
        resolve("hf:some/model")
    repo = tmp_path / "hf" / "hub" / "models--some--model"
    shutil.copytree(package.path, repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    assert open_package(resolve("hf:some/model")).config == package.config


def test_hugging_faces_client_offline_is_one_clear_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(HubError, match=r"hf:some/model-that-is-not-there is not in .* HF_HUB_OFFLINE is set") as caught:
        resolve("hf:some/model-that-is-not-there")
    assert "\n" not in str(caught.value)


def test_a_missing_database_says_to_train_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("GPT_FOUNDRY_HOME", str(tmp_path))
    with pytest.raises(HubError, match=rf"no database at sqlite:///{tmp_path}/mlflow/mlflow\.db; train a model first"):
        resolve("models:/gpt@champion")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["127.0.0.1:9", "127.0.0.1:port"])
def test_a_password_in_the_tracking_uri_is_neither_shown_nor_read_as_a_host(host: str) -> None:
    with pytest.raises(HubError, match=r"http://127.0.0.1:.* does not answer") as caught:
        resolve("models:/gpt@champion", tracking_uri=f"http://me:secret@{host}")
    assert "secret" not in str(caught.value)
    assert "not known" not in str(caught.value)


def test_a_server_that_is_down_is_reported_within_seconds() -> None:
    port = free_port()
    start = time.monotonic()
    with pytest.raises(HubError, match=rf"http://127.0.0.1:{port} does not answer"):
        resolve("models:/gpt@champion", tracking_uri=f"http://127.0.0.1:{port}")
    assert time.monotonic() - start < 6


@pytest.fixture
def registry(tmp_path: Path, package: Package, monkeypatch: pytest.MonkeyPatch) -> str:
    """A real MLflow on sqlite, with the package as version 1 of `gpt` and its champion. Returns the run's id."""
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(None)  # a test before this one may have set another
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    experiment = mlflow.create_experiment("gpt", artifact_location=(tmp_path / "artifacts").as_uri())
    with mlflow.start_run(experiment_id=experiment) as run:
        mlflow.pyfunc.log_model(
            name="model",
            loader_module="gptcore.pyfunc",
            data_path=str(package.path),
            registered_model_name="gpt",
            pip_requirements=["torch"],
        )
    mlflow.MlflowClient().set_registered_model_alias("gpt", "champion", "1")
    return run.info.run_id


def test_mlflows_names_resolve_to_the_package_inside_its_model(registry: str, package: Package) -> None:
    import mlflow

    for name in ("models:/gpt@champion", "models:/gpt/1", f"runs:/{registry}/model"):
        found = open_package(resolve(name))
        assert found.config == package.config
        assert found.info == package.info
    with pytest.raises(HubError, match="Did you mean 'models:/gpt@champion'") as caught:
        resolve("models:/gpt@champoin")
    assert "\n" not in str(caught.value)
    with pytest.raises(HubError, match="MLflow has no model 'runs:/nothing/model'"):
        resolve("runs:/nothing/model")

    loaded = mlflow.pyfunc.load_model("models:/gpt@champion")
    texts = loaded.predict(["one", "two"])
    assert len(texts) == 2
    assert all(isinstance(text, str) for text in texts)


def test_an_mlflow_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_text("flavors:\n  python_function:\n    loader_module: mlflow.sklearn\n")
    with pytest.raises(HubError, match="without a model package"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        "flavors: {python_function: {data: ../secret}}",
        "flavors: {python_function: {data: /etc}}",
        "flavors: {python_function: {data: data/../../secret}}",
        "flavors: {python_function: {data: [1]}}",
        "flavors: {python_function: data}",
        "flavors: 3",
        "- 1",
        "{",
        "",
        "[" * 100_000,
    ],
    ids=lambda text: text[:60],
)
def test_an_mlflow_model_may_only_point_to_a_package_inside_itself(
    content: str, package: Package, tmp_path: Path
) -> None:
    package.path.rename(tmp_path / "secret")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "MLmodel").write_text(content)
    with pytest.raises(HubError, match="without a model package"):
        resolve(str(tmp_path / "model"))
