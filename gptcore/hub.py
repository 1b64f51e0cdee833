"""Finds a model by name: a path, a URL, MLflow's models:/… or runs:/…, or hf:ORG/NAME.

`resolve` returns a folder for `gptcore.package.open_package`, after a download if necessary. MLflow, Hugging Face's
client and fsspec are imported only when such a name needs them. Nothing is unpickled.
"""

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from gptcore.documents import read_text
from gptcore.errors import HubError, did_you_mean
from gptcore.files import whole_folder
from gptcore.home import default_tracking_uri, expanded, home
from gptcore.package import PICKLE, PICKLES, missing_files
from gptcore.progress import doing
from gptcore.redact import reason, without_password
from gptcore.stores import file_system
from gptcore.weights import WEIGHTS, is_plain

KINDS = (
    "a folder, models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID/model, hf:ORG/NAME or a URL such as "
    "s3://BUCKET/FOLDER"
)
PACKAGE_FILES = ["*.json", "*.safetensors", "merges.txt"]
TEMPLATES = "*.jinja"
"""Chat templates, which a package keeps, but does not need."""
INCLUDE = " ".join(f"--include '{pattern}'" for pattern in PACKAGE_FILES)
EXAMPLE = "openai-community/gpt2"
OLD_NAMES = {f"gpt2{size}": f"openai-community/gpt2{size}" for size in ("", "-medium", "-large", "-xl")} | {
    "distilgpt2": "distilbert/distilgpt2"
}
"""Names on the hub before models had owners, and the current ones; caches contain both."""
KNOWN = frozenset(OLD_NAMES.values())
SERVER_SECONDS = 5


def resolve(name: str, tracking_uri: str | None = None, into: Path | None = None) -> Path:
    """The package folder of the model called `name`, not opened.

    models:/ and runs:/ are looked up at `tracking_uri`: by default $MLFLOW_TRACKING_URI, else the embedded database.
    Downloads go `into` that folder. By default, those from a tracking server go to a temporary folder that is kept, and
    those from a URL to the cache. Raises HubError if there is no such model.
    """
    with doing(f"looking for the model {without_password(name)}"):
        return _resolved(name, tracking_uri, into)


def _resolved(name: str, tracking_uri: str | None, into: Path | None) -> Path:
    if name.startswith(("models:/", "runs:/")):
        return _package_inside(_download(name, tracking_uri or default_tracking_uri(), into), name)
    if name.startswith("hf:"):
        return _from_hugging_face(name.removeprefix("hf:"))
    if "://" in name:
        return _fetch(name, into or home() / ".cache" / "packages")
    folder = expanded(name, HubError)
    if folder.is_dir():
        return _package_inside(folder.absolute(), name)
    if folder.exists():
        raise HubError(f"{name!r} is a file; expected {KINDS}")
    near = [str(folder.with_name(p.name)) for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
    raise HubError(f"there is no model {name!r}; expected {KINDS}.{did_you_mean(name, near)}")


def _package_inside(folder: Path, name: str) -> Path:
    """`folder` itself, or the package inside it: an MLflow model's data, or a snapshot in Hugging Face's cache."""
    if (folder / "snapshots").is_dir() and not (folder / "config.json").exists():
        return _best_snapshot([folder])[0] or folder
    if not (folder / "MLmodel").is_file():
        return folder
    import yaml

    try:
        data = yaml.safe_load(read_text(folder / "MLmodel", kind=HubError))["flavors"]["python_function"]["data"]
        inside = all(is_plain(part) for part in data.split("/")) and (folder / data / "config.json").exists()
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, RecursionError):
        inside = False
    if not inside:
        raise HubError(f"{name!r} is an MLflow model without a model package of this project")
    return folder / str(data)


# --- MLflow ----------------------------------------------------------------------------------------------------


def _download(name: str, tracking_uri: str, into: Path | None) -> Path:
    """The folder of an MLflow model, downloaded if it is not on this machine."""
    _check_reachable(name, tracking_uri)
    remote = tracking_uri.startswith(("http://", "https://"))
    import mlflow
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(tracking_uri)  # alias lookups only use the process-wide URI
    try:
        return Path(mlflow.artifacts.download_artifacts(name, dst_path=str(into) if into and remote else None))
    except MlflowException as error:
        if error.error_code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise HubError(
                f"MLflow at {without_password(tracking_uri)} does not let this user read {name!r}; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            ) from error
        raise HubError(f"MLflow has no model {name!r}: {reason(error)}{_nearest(name, tracking_uri)}") from error
    except OSError as error:
        raise HubError(f"the files of {name!r} cannot be downloaded: {error}") from error


def _check_reachable(name: str, tracking_uri: str) -> None:
    """Raises HubError at once if MLflow is unreachable; its client would retry for minutes."""
    if tracking_uri.startswith("sqlite:///") and not Path(tracking_uri.removeprefix("sqlite:///")).exists():
        raise HubError(
            f"{name!r} is looked up in MLflow, and there is no database at {tracking_uri}; train a model first, or "
            "set MLFLOW_TRACKING_URI"
        )
    if not tracking_uri.startswith(("http://", "https://")):
        return
    shown = without_password(tracking_uri)
    try:
        urllib.request.urlopen(f"{shown.rstrip('/')}/health", timeout=SERVER_SECONDS).close()
    except urllib.error.HTTPError:
        return  # the server answers
    except (OSError, http.client.HTTPException) as error:
        raise HubError(f"{name!r} is looked up in MLflow, and {shown} does not answer: {error}") from error


def _nearest(name: str, tracking_uri: str) -> str:
    """A suggestion for a models:/ name, from the registry's models."""
    if not name.startswith("models:/"):
        return ""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri, tracking_uri)
    known: list[str] = []
    for model in client.search_registered_models(max_results=100):
        known += [f"models:/{model.name}@{alias}" for alias in model.aliases]
        known += [f"models:/{model.name}/{version.version}" for version in model.latest_versions]
    return did_you_mean(name, known)


# --- URLs ------------------------------------------------------------------------------------------------------


def _fetch(url: str, into: Path) -> Path:
    """A copy of the package at `url`, in a folder named by a hash of its file list, so a change is downloaded again.

    Opening the package compares each file with the sha256 in its manifest.
    """
    fs, path = file_system(url)
    try:
        fs.invalidate_cache()
        listed = sorted(fs.ls(path, detail=True), key=lambda file: str(file["name"]))
        names = [PurePosixPath(file["name"]).name for file in listed]
        wanted = [
            name
            for name in names
            if any(fnmatch(name, pattern) for pattern in (*PACKAGE_FILES, TEMPLATES, "README.md"))
        ]
        if "config.json" not in wanted:
            raise FileNotFoundError
        folder = into / hashlib.sha256(repr((url, listed)).encode()).hexdigest()[:32]
        if not folder.is_dir():
            with whole_folder(folder, replace=False, flush=False) as partial:  # hashes tell
                for name in wanted:
                    fs.get_file(f"{path}/{name}", str(partial / name))
        return folder
    except FileNotFoundError as error:
        raise HubError(
            f"there is no model at {without_password(url)!r}: config.json is missing; expected {KINDS}"
        ) from error
    except Exception as error:  # each client has its own exceptions for network, keys and permissions
        raise HubError(f"the files of {without_password(url)!r} cannot be downloaded: {reason(error)}") from error


# --- Hugging Face ----------------------------------------------------------------------------------------------


def _from_hugging_face(repo: str) -> Path:
    """A complete snapshot of `repo`: the newest if the hub's client can download it, else a cached one."""
    repo = OLD_NAMES.get(repo, repo)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
        raise HubError(f"'hf:{repo}' is not a name on Hugging Face's hub; expected hf:ORG/NAME, as in hf:{EXAMPLE}")
    why = _download_snapshot(repo)
    old = [name for name, new in OLD_NAMES.items() if new == repo]
    folders = [_cache() / f"models--{name.replace('/', '--')}" for name in (repo, *old)]
    snapshot, lack = _best_snapshot(folders)
    if snapshot and not lack:
        return snapshot
    state = f"is incomplete in {_cache()}: {snapshot} lacks {', '.join(lack)}" if snapshot else f"is not in {_cache()}"
    raise HubError(
        f"hf:{repo} {state}; {why}. On a machine with network access, run `hf download {repo} {INCLUDE}` and copy "
        f"{folders[0].name} from its cache into this one, or give the path of a folder with config.json, {WEIGHTS} and "
        f"tokenizer.json.{'' if repo in KNOWN else did_you_mean(repo, KNOWN)}"
    )


def _download_snapshot(repo: str) -> str:
    """Download the newest snapshot of `repo` into the cache; return why a complete one is not available."""
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError:
        return "to download it, install Hugging Face's client (pip install huggingface-hub)"
    hub: Any = huggingface_hub
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so it was not downloaded"
    try:
        # This call has no default timeout; the later ones do.
        found = hub.HfApi().model_info(repo, timeout=SERVER_SECONDS)
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"the hub has no model hf:{repo}, or it is private and needs `hf auth login`.{did_you_mean(repo, KNOWN)}"
        ) from error
    except Exception as error:  # the client's exceptions have no common base
        return f"the hub cannot be reached ({reason(error).rstrip('.')})"
    names = [file.rfilename for file in found.siblings or ()]
    if not any(name.endswith(".safetensors") for name in names) and (bad := sorted({*names} & {*PICKLES})):
        raise HubError(f"hf:{repo} has no {WEIGHTS}; its {bad[0]} {PICKLE}")
    try:
        patterns = dict(allow_patterns=[*PACKAGE_FILES, TEMPLATES], ignore_patterns="*/*")
        hub.snapshot_download(repo, cache_dir=_cache(), **patterns)
    except Exception as error:
        return f"it cannot be downloaded ({reason(error).rstrip('.')})"
    return "the hub's copy is not a complete model"


def _cache() -> Path:
    """The cache folder of Hugging Face's client."""
    env = os.environ
    cache = env.get("XDG_CACHE_HOME") or "~/.cache"
    folder = env.get("HF_HUB_CACHE") or Path(env.get("HF_HOME") or Path(cache) / "huggingface") / "hub"
    return expanded(folder, HubError)


def _best_snapshot(folders: list[Path]) -> tuple[Path | None, list[str]]:
    """The first complete snapshot in these cache folders, `main` first; else the first one, and its missing files."""
    found = [snapshot for folder in folders for snapshot in _snapshots(folder)]
    lacks: list[tuple[Path | None, list[str]]] = [(snapshot, missing_files(snapshot)) for snapshot in found]
    whole = [pair for pair in lacks if not pair[1]]
    return (whole or lacks or [(None, ["everything"])])[0]


def _snapshots(folder: Path) -> list[Path]:
    """The snapshots in a repository's cache folder: `main`, then the others."""
    ref = folder / "refs" / "main"
    main = ref.read_text(errors="replace").strip() if ref.is_file() else ""
    found = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    return sorted(found, key=lambda path: (path.name != main, path.name))
