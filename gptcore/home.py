"""Where this project keeps what it writes: runs, caches, the embedded MLflow.

The same folder for `python train_job/run.py`, a job submitted from the checkout, and one submitted with
`--working-dir .`, which Ray runs from a copy: the environment remembers the checkout that it was installed from.
"""

import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gptcore.errors import ConfigError, FoundryError


def checkout() -> Path | None:
    """The folder that this environment's gpt-foundry was installed from, if it was one and still exists."""
    # A copy's own metadata may come first on the path; only the environment's says where it came from.
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
    """$MLFLOW_TRACKING_URI, or else the embedded database."""
    return environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow' / 'mlflow.db'}"


def expanded(path: str | Path, kind: type[FoundryError] = ConfigError) -> Path:
    """`path` with a ~ or ~USER at its beginning replaced; raises an error of that kind if nobody knows what by."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise kind(f"{str(path)!r} begins in a home folder that is not known here; expected the whole path") from None
