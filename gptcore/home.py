"""The folder for everything this project writes: runs, caches, the embedded MLflow.

It is the same for `python train_job/run.py`, a job submitted from the checkout, and one submitted with
`--working-dir .`, which Ray runs from a copy: the environment records the checkout that it was installed from.
"""

import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gptcore.errors import ConfigError, FoundryError


def checkout() -> Path | None:
    """The folder that this environment's gpt-foundry was installed from, if it still exists."""
    # A copy's own metadata may come first on the path; only the environment's contains the origin.
    for installed in importlib.metadata.distributions(name="gpt-foundry"):
        url = urlsplit(json.loads(installed.read_text("direct_url.json") or "{}").get("url", ""))
        folder = Path(unquote(url.path))
        if url.scheme == "file" and folder.is_dir():
            return folder
    return None


def home() -> Path:
    """$GPT_FOUNDRY_HOME, else the checkout, else ~/.gpt-foundry."""
    if named := os.environ.get("GPT_FOUNDRY_HOME"):
        return expanded(named).absolute()
    return checkout() or expanded("~/.gpt-foundry")


def default_tracking_uri(environ: Mapping[str, str] = os.environ) -> str:
    """$MLFLOW_TRACKING_URI, or else the embedded sqlite database; absolute, since Ray's workers change folder."""
    uri = environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow' / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri


def expanded(path: str | Path, kind: type[FoundryError] = ConfigError) -> Path:
    """`path` with a leading ~ or ~USER expanded; raises an error of type `kind` if that home folder is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise kind(f"{str(path)!r} starts with an unknown home folder; expected the full path") from None
