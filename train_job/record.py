"""What a run's folder says of it in run.json: where it is tracked, and the objects that its text was read from.

In and out: that file. A run that goes on finds its MLflow run and its text by it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING

from gptcore.redact import without_password
from train_job.files import written_whole

if TYPE_CHECKING:
    from train_job.inputs import Inputs
    from train_job.remote import Origin

    Begun = Mapping[str, Sequence[Origin]]


def tracked_at(record: Path) -> str:
    """Where a run is tracked: for one that goes on, where it was, unless the environment says otherwise."""
    from train_job.tracking import tracking_uri

    if record.exists() and not os.environ.get("MLFLOW_TRACKING_URI"):
        return str(json.loads(record.read_text())["tracking_uri"])
    return tracking_uri()


def write_record(record: Path, run_id: str, uri: str, inputs: Inputs) -> None:
    """Keeps which MLflow run a folder belongs to, and the objects that its text was read from."""

    text = {name: [astuple(origin) for origin in origins] for name, origins in origins_of(inputs).items()}
    with written_whole(record) as file:
        file.write(json.dumps({"run_id": run_id, "tracking_uri": without_password(uri), "text": text}).encode())


def begun_with(record: Path) -> Begun | None:
    """The objects that a run's text was read from, by what the corpus is called; None if it has not begun."""
    from train_job.remote import Origin

    if not record.exists():
        return None
    text = json.loads(record.read_text()).get("text", {})
    return {name: [Origin(*origin) for origin in origins] for name, origins in text.items()}


def origins_of(inputs: Inputs) -> Begun:
    """The same of inputs that are open."""
    return {corpus.name: corpus.origins for corpus in (inputs.train_corpus, inputs.validation_corpus)}
