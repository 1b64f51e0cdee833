"""A run that has been opened, and how its training ended: the two values that the driver's side works with.

In: a config and what it is trained on. Out: a `Session`, built whole by `open_session`. Training turns it into a
`Trained`, and `train_job.session.finish` turns both into a package, a registered version and an exit code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gptcore.errors import FoundryError, TrainingError
from gptcore.hf_format import empty_model
from gptcore.home import home
from gptcore.redact import without_password
from train_job.config import TrainConfig
from train_job.session.console import Console, model_text
from train_job.session.history import History
from train_job.session.record import CONFIG, RUN, read_record, write_record
from train_job.session.stop import StopSignals
from train_job.session.whatnow import script_command
from train_job.tracking import runs as tracking
from train_job.tracking.pages import NOTE
from train_job.training.events import Finished, Started
from train_job.training.storage import keep_record
from train_job.yaml_files import write_yaml

if TYPE_CHECKING:
    from train_job.data.inputs import Inputs


@dataclass(frozen=True)
class Session:
    """A run that is open in its folder and in MLflow."""

    config: TrainConfig
    run_dir: Path
    inputs: Inputs
    uri: str = field(repr=False)
    """Where MLflow is; it may hold a password."""
    run_id: str
    experiment_id: str
    """Empty if MLflow could not be asked."""
    history: History
    console: Console
    stops: StopSignals


@dataclass(frozen=True)
class Trained:
    """How training ended. `began` is None if no worker got as far as its first step."""

    began: Started | None = None
    finished: Finished | None = None
    problem: FoundryError | None = None
    worker_memory: Mapping[str, float] = field(default_factory=dict)
    """Peak MiB by "worker N memory"."""


def open_session(
    inputs: Inputs,
    run_dir: Path,
    uri: str,
    console: Console,
    stops: StopSignals,
    title: str = "",
    tags: Mapping[str, str] | None = None,
) -> Session:
    """Opens a run in MLflow, or reopens the one that the folder names.

    `title` is the run's name in MLflow, by default that of the run; `tags` are added to the run's own. Raises
    RecordError, TrainingError, StorageFull; the MLflow run is then marked FAILED.
    """
    config = inputs.config
    history = History(run_dir / "history.jsonl")
    if history.damaged:
        console.say(f"{history.path}: {history.damaged} damaged lines were removed")
    record = read_record(run_dir / RUN)
    run_id = record.run_id if record else _start(inputs, uri, title or str(config.name), tags or {})
    try:
        if record:
            tracking.resume_run(uri, run_id)
            points = tracking.losses(uri, run_id)
            history.recall(points, config.batch_size * config.context, inputs.steps_per_epoch)
        write_yaml(config.flat(), run_dir / CONFIG)  # before run.json: a run with this file alone can be resumed
        if not record:
            write_record(run_dir / RUN, run_id, uri, inputs)
        experiment_id = ""
        with contextlib.suppress(TrainingError):  # it is only needed for a link
            experiment_id = tracking.experiment_of(uri, run_id)
        if "://" in str(config.storage_path):
            keep_record(str(config.storage_path), run_dir)
    except BaseException:
        with contextlib.suppress(TrainingError):
            tracking.finish_run(uri, run_id, "FAILED")
        raise
    return Session(config, run_dir, inputs, uri, run_id, experiment_id, history, console, stops)


def _start(inputs: Inputs, uri: str, title: str, tags: Mapping[str, str]) -> str:
    """Starts a run in MLflow with its parameters, tags and datasets; returns its id."""
    config = inputs.config
    settings = config.flat()
    del settings["name"]  # it differs between all runs, so it would only add noise to MLflow's comparison
    text = f"{inputs.train_corpus.name} ({inputs.train.size}, {inputs.tokenizer.name})"
    own = {
        "tokenizer": inputs.tokenizer.fingerprint,
        NOTE: without_password(f"{label(inputs)}; on {text}"),
    }
    if config.init_from:
        own["parent"] = config.init_from
    return tracking.start_run(
        uri,
        settings | {"tokenizer": inputs.tokenizer.name} | asdict(inputs.model),
        name=title,
        datasets=dataset_uses(inputs),
        tags=dict(tags) | own,
        experiment=config.experiment,
    )


def dataset_uses(inputs: Inputs) -> list[tracking.DatasetUse]:
    """The training and validation splits as MLflow's datasets."""
    return [
        tracking.DatasetUse(context, corpus.name, inputs.config.data, corpus.fingerprint, t.num_bytes, t.num_tokens)
        for context, corpus, t in (
            ("train", inputs.train_corpus, inputs.train),
            ("validation", inputs.validation_corpus, inputs.validation),
        )
    ]


def label(inputs: Inputs) -> str:
    """One line that says what is trained."""
    return model_text(inputs.config, inputs.model, empty_model(inputs.model).num_parameters())


def resume_command(config: TrainConfig) -> str:
    """The command that resumes this run."""
    default = config.storage_path == str(home() / "runs")
    storage = [] if default else ["--storage-path", str(config.storage_path)]
    return script_command("train_job/run.py", "--resume", str(config.name), *storage)
