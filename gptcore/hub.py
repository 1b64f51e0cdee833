"""A model's name to the folder of its package: a path, MLflow's models:/… or runs:/…, or Hugging Face's hf:org/name.

MLflow and the hub's client are imported only when such a name is asked for. What comes out is a folder for
`gptcore.package.open_package`; what others keep in the registry is fetched, never unpickled.
"""

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from gptcore.errors import HubError, did_you_mean
from gptcore.home import home

KINDS = "a folder, models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID/model or hf:ORG/NAME"
PACKAGE_FILES = ["*.json", "*.safetensors", "merges.txt"]
SERVER_SECONDS = 5


def resolve(name: str, tracking_uri: str | None = None, into: Path | None = None) -> Path:
    """The package folder that `name` stands for; it is not opened here.

    `tracking_uri` is where models:/ and runs:/ are looked up: by default $MLFLOW_TRACKING_URI, else the embedded
    database. What a tracking server sends goes `into` that folder, by default a temporary one that stays. Raises
    HubError if the name leads nowhere.
    """
    if name.startswith(("models:/", "runs:/")):
        return _package_inside(_download(name, tracking_uri or _tracking_uri(), into), name)
    if name.startswith("hf:"):
        return _from_hugging_face(name.removeprefix("hf:"))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _package_inside(folder.absolute(), name)
    if folder.exists():
        raise HubError(f"{name!r} is a file; expected {KINDS}")
    near = [str(folder.with_name(p.name)) for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
    raise HubError(f"there is no model {name!r}; expected {KINDS}.{did_you_mean(name, near)}")


def _package_inside(folder: Path, name: str) -> Path:
    """`folder` itself, or the data of the MLflow model that it is."""
    if not (folder / "MLmodel").is_file():
        return folder
    import yaml

    flavors = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8")).get("flavors", {})
    data = flavors.get("python_function", {}).get("data")
    if not data or not (folder / data / "config.json").is_file():
        raise HubError(f"{name!r} is an MLflow model, but not one of ours: it holds no model package")
    return folder / data


# --- MLflow ----------------------------------------------------------------------------------------------------


def _tracking_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow' / 'mlflow.db'}"


def _download(name: str, tracking_uri: str, into: Path | None) -> Path:
    """The folder of an MLflow model: where it lies if that is this machine, else a download."""
    _check_reachable(name, tracking_uri)
    remote = tracking_uri.startswith(("http://", "https://"))
    import mlflow
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(tracking_uri)  # aliases are looked up through the process-wide one alone
    try:
        return Path(mlflow.artifacts.download_artifacts(name, dst_path=str(into) if into and remote else None))
    except MlflowException as error:
        raise HubError(f"MLflow knows no model {name!r}: {_reason(error)}{_nearest(name, tracking_uri)}") from error
    except OSError as error:
        raise HubError(f"the files of {name!r} cannot be fetched: {error}") from error


def _check_reachable(name: str, tracking_uri: str) -> None:
    """Raises HubError now rather than after the minutes for which MLflow's client keeps trying."""
    if tracking_uri.startswith("sqlite:///") and not Path(tracking_uri.removeprefix("sqlite:///")).exists():
        raise HubError(
            f"{name!r} is looked up in MLflow, and there is no database at {tracking_uri}; train a model first, or "
            "set MLFLOW_TRACKING_URI"
        )
    if not tracking_uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{tracking_uri.rstrip('/')}/health", timeout=SERVER_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answers, so it is there
    except OSError as error:
        raise HubError(f"{name!r} is looked up in MLflow, and {tracking_uri} does not answer: {error}") from error


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") + "."


def _nearest(name: str, tracking_uri: str) -> str:
    """A suggestion for a models:/ name, from what the registry holds."""
    if not name.startswith("models:/"):
        return ""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri, tracking_uri)
    known: list[str] = []
    for model in client.search_registered_models(max_results=100):
        known += [f"models:/{model.name}@{alias}" for alias in model.aliases]
        known += [f"models:/{model.name}/{version.version}" for version in model.latest_versions]
    return did_you_mean(name, known)


# --- Hugging Face ----------------------------------------------------------------------------------------------


def _from_hugging_face(repo: str) -> Path:
    """The newest local snapshot of `repo`, downloaded where the hub's client is installed and the network is there."""
    try:
        import huggingface_hub
    except ImportError:
        cached = _cached_snapshot(repo)
        if cached is None:
            raise HubError(
                f"hf:{repo} is not in the local cache; `pip install huggingface-hub` to download it"
            ) from None
        return cached
    hub: Any = huggingface_hub
    try:
        return Path(hub.snapshot_download(repo, allow_patterns=PACKAGE_FILES))
    except Exception as error:  # its errors share no base: HTTP, offline mode, a malformed name
        cached = _cached_snapshot(repo)
        if cached is None:
            raise HubError(f"hf:{repo} cannot be downloaded and is not in the local cache: {_reason(error)}") from error
        return cached


def _cached_snapshot(repo: str) -> Path | None:
    """The snapshot in Hugging Face's cache that `main` points to."""
    root = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    folder = Path(os.environ.get("HF_HUB_CACHE", root)) / f"models--{repo.replace('/', '--')}"
    if not (folder / "refs" / "main").is_file():
        return None
    snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
    return snapshot if snapshot.is_dir() else None
