"""A sweep that has been opened: the value that its trials and its end work with.

In: a sweep's config and its folder. Out: its trials with what they are trained on, and a `Sweep`, built whole by
`open_sweep`. `train_job.sweeps.tuning` runs its trials, whose folders are the record of how they ended, and
`train_job.sweeps.finish` turns these into a table, a registered version and an exit code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import TrainingError
from gptcore.home import home
from train_job.cluster.prepare import prepare_on_cluster
from train_job.config import build_config
from train_job.session.begin import absolute
from train_job.session.console import Console
from train_job.session.record import RUN, origins_of, read_record, write_record
from train_job.session.session import dataset_uses
from train_job.session.stop import StopSignals
from train_job.session.whatnow import script_command
from train_job.sweeps.begin import PLAN
from train_job.sweeps.space import SweepConfig, described
from train_job.sweeps.trials import Trial
from train_job.tracking import runs as tracking
from train_job.tracking.pages import NOTE
from train_job.tracking.registry import pin
from train_job.yaml_files import write_yaml

if TYPE_CHECKING:
    from train_job.data.inputs import Inputs


@dataclass(frozen=True)
class Sweep:
    """A sweep that is open in its folder and in MLflow."""

    config: SweepConfig
    run_dir: Path
    trials: tuple[Trial, ...]
    inputs: Mapping[int, Inputs]
    """What each trial is trained on, by its number."""
    uri: str = field(repr=False)
    """Where MLflow is; it may hold a password."""
    run_id: str
    experiment_id: str
    """Empty if MLflow could not be asked."""
    console: Console
    stops: StopSignals

    @property
    def name(self) -> str:
        """The name of the sweep; its folder may have been renamed."""
        return str(self.config.base["name"])

    @property
    def grace_steps(self) -> int:
        """The first step at which ASHA may stop a trial."""
        return self.config.grace_steps or self.inputs[1].config.eval_interval or 1


def with_pinned_parent(config: SweepConfig, uri: str) -> SweepConfig:
    """The config with the version that `init_from` names now, so that all trials start from the same one."""
    parent = config.base.get("init_from")
    return replace(config, base=config.base | {"init_from": pin(str(parent), uri)}) if parent else config


def prepare_trials(config: SweepConfig, run_dir: Path, cluster: Callable[[], Any]) -> dict[int, tuple[Trial, Inputs]]:
    """Every trial with its inputs, by its number. Shards are made here, before the first trial starts."""
    storage = str(config.base["storage_path"])
    sweep = str(config.base["name"])
    storage = f"{storage.rstrip('/')}/{sweep}" if "://" in storage else str(run_dir)
    record = read_record(run_dir / RUN)
    begun = record.text if record else None
    every: dict[str, int | None] = {}
    prepared: dict[int, tuple[Trial, Inputs]] = {}
    for number, values in enumerate(config.values(), start=1):
        name = f"{sweep}-{number:02}"
        run = absolute(build_config(config.base, values, {"name": name}), storage, run_dir)
        trial = Trial(number, values, replace(run, **every), run_dir / name)  # type: ignore[arg-type]
        inputs = prepare_on_cluster(trial.config, cluster, begun)
        begun = origins_of(inputs)  # all read the text of the first, and are evaluated as often
        every = every or {name: getattr(inputs.config, name) for name in ("log_interval", "eval_interval")}
        prepared[number] = trial, inputs
    return prepared


def open_sweep(
    config: SweepConfig,
    run_dir: Path,
    prepared: Mapping[int, tuple[Trial, Inputs]],
    uri: str,
    console: Console,
    stops: StopSignals,
) -> Sweep:
    """Opens the parent run in MLflow, or reopens the one that the folder names.

    Raises RecordError, TrainingError, StorageFull; the MLflow run is then marked FAILED.
    """
    first = prepared[1][1]
    record = read_record(run_dir / RUN)
    run_id = record.run_id if record else _start(config, run_dir.name, len(prepared), first, uri)
    try:
        if record:
            tracking.resume_run(uri, run_id)
        write_yaml(asdict(config), run_dir / PLAN)
        if not record:
            write_record(run_dir / RUN, run_id, uri, first)
        experiment_id = ""
        with contextlib.suppress(TrainingError):  # it is only needed for a link
            experiment_id = tracking.experiment_of(uri, run_id)
    except BaseException:
        with contextlib.suppress(TrainingError):
            tracking.finish_run(uri, run_id, "FAILED")
        raise
    trials = tuple(trial for trial, _ in prepared.values())
    inputs = {number: inputs for number, (_, inputs) in prepared.items()}
    return Sweep(config, run_dir, trials, inputs, uri, run_id, experiment_id, console, stops)


def _start(config: SweepConfig, name: str, trials: int, inputs: Inputs, uri: str) -> str:
    """Starts the parent run in MLflow with its parameters, tags and datasets; returns its id."""
    return tracking.start_run(
        uri,
        asdict(config) | {"base": {k: v for k, v in config.base.items() if k != "storage_path"}},
        name=name,
        datasets=dataset_uses(inputs),
        tags={"sweep": name, NOTE: f"A sweep of {trials} trials: {described(config.search)}"},
        experiment=inputs.config.experiment,
    )


def resume_command(run_dir: Path) -> str:
    """The command that resumes the sweep in this folder."""
    default = run_dir.parent == home() / "runs"
    storage = [] if default else ["--storage-path", str(run_dir.parent)]
    return script_command("train_job/sweep.py", "--resume", run_dir.name, *storage)
