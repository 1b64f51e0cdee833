"""Reads and writes a run's run.json and config.yaml: where it is tracked, its settings, its text.

A resumed run finds its MLflow run, its settings and the objects that its text was read from in these files. Damage in
them is an error that names the file: guessing would make it another run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import RecordError
from gptcore.redact import without_password
from train_job.config import ADDED, build_config
from train_job.files import read_json, write_json
from train_job.yaml_files import read_yaml

if TYPE_CHECKING:
    from train_job.data.fetch import Origin
    from train_job.data.inputs import Inputs

    Begun = Mapping[str, Sequence[Origin]]

CONFIG = "config.yaml"
"""In a run's folder: every setting that it was begun with."""
RUN = "run.json"
"""In a run's folder: its run in MLflow, and the objects that its text was read from."""


@dataclass(frozen=True)
class Record:
    """The content of run.json: the run in MLflow, its address, and the objects that each corpus was read from."""

    run_id: str
    tracking_uri: str
    text: Begun


def read_record(path: Path) -> Record | None:
    """Reads run.json; None if there is none, since the run was never opened. Raises RecordError if it is damaged."""
    from train_job.data.fetch import Origin

    if not os.path.lexists(path):
        return None
    remedy = (
        'it names the run in MLflow. Put a copy back, or write {"run_id": …, "tracking_uri": …} there as '
        f"{path.parent / 'spool' / 'spool.json'} has them, or begin a new run"
    )
    found = read_json(path, remedy)
    try:
        run_id, uri = found["run_id"], found["tracking_uri"]
        text = {
            name: [Origin(*map(str, origin)) for origin in origins] for name, origins in found.get("text", {}).items()
        }
        if not (isinstance(run_id, str) and isinstance(uri, str) and run_id and uri):
            raise TypeError
    except KeyError as lacking:
        raise RecordError(f"{path} lacks {lacking.args[0]!r}; {remedy}") from None
    except (TypeError, AttributeError):
        raise RecordError(f"{path} is damaged; {remedy}") from None
    return Record(run_id, uri, text)


def tracked_at(record: Record | None) -> str:
    """MLflow's address for a run: a resumed run keeps its own unless MLFLOW_TRACKING_URI is set."""
    from gptcore.home import default_tracking_uri

    if record and not os.environ.get("MLFLOW_TRACKING_URI"):
        return record.tracking_uri
    return default_tracking_uri()


def write_record(path: Path, run_id: str, uri: str, inputs: Inputs) -> None:
    """Writes run.json."""
    text = {name: [astuple(origin) for origin in origins] for name, origins in origins_of(inputs).items()}
    write_json(path, {"run_id": run_id, "tracking_uri": without_password(uri), "text": text})


def origins_of(inputs: Inputs) -> Begun:
    """The objects that the text was read from, by corpus."""
    return {corpus.name: corpus.origins for corpus in (inputs.train_corpus, inputs.validation_corpus)}


def saved_settings(path: Path) -> dict[str, Any]:
    """Reads config.yaml. Raises ConfigError or RecordError unless every setting is there.

    A missing setting would take its default, and the next steps would be those of another run.
    """
    if not path.exists():
        raise RecordError(f"{path} is missing; put a copy back, or begin a new run")
    saved = read_yaml(str(path))
    if lacking := [name for name in build_config(saved).flat() if name not in saved.keys() | ADDED]:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise RecordError(
            f"{path} lacks {lacking[0]!r}{more}: it was cut short or altered. Put a copy back, or write "
            "there what the run began with, or begin a new run"
        )
    return saved
