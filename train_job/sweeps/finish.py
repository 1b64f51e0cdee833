"""After the last trial: a table and figures of all trials, and the best one's model as a registered version.

In: a `Sweep` whose trials have ended. Out: files in the sweep's folder and in MLflow, an exit code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptcore.errors import ConfigError, RecordError, TrainingError
from gptcore.package import open_package
from train_job import figures
from train_job.files import read_json
from train_job.session.finish import OUTCOME, deliver, register
from train_job.session.history import History
from train_job.session.record import RUN, Record, read_record
from train_job.session.report import ended
from train_job.session.session import Session, Trained
from train_job.session.whatnow import Ended, lines
from train_job.sweeps.begin import PLAN
from train_job.sweeps.session import Sweep, resume_command
from train_job.sweeps.trials import ENDING, Trial, ranked, table, table_text, write_table
from train_job.tracking import runs as tracking
from train_job.tracking.spool import Spool


def finish(sweep: Sweep) -> int:
    """Prints the table and registers the best trial's package; returns the exit code."""
    say = sweep.console.say
    rows = table(sweep.trials)
    for line in table_text(rows):
        say(line)
    best, ending = ranked(sweep.trials)[0]
    files = [*write_table(rows, sweep.run_dir), *_figures(sweep, best), sweep.run_dir / PLAN, sweep.console.path]
    tags, code = {}, 1
    if ending.status == "FINISHED":
        say(f"best      {best.title}")
        code = register(_session(sweep, best), Trained(), open_package(best.folder / "package"), tell_what_now=False)
    version = read_json(best.folder / OUTCOME, "the version is in MLflow") if code == 0 else None
    what_now(sweep, best, version)
    if version:
        tags = {"sweep.best": best.name, "sweep.version": f"{version['name']} {version['version']}"}
    sweep.stops.late = True
    deliver(_spooled(sweep), files, say)
    try:
        tracking.tag_run(sweep.uri, sweep.run_id, tags)
    except TrainingError as error:
        say(f"warning: {error}")
    end(sweep, "FINISHED" if code == 0 else "FAILED")
    return code


def what_now(sweep: Sweep, best: Trial | None = None, version: Mapping[str, Any] | None = None) -> None:
    """Prints how to go on: with the best trial's model if there is one, and with the sweep if it is not over."""
    there = None
    if best and (record := read_record(best.folder / RUN)):  # else it failed before its run was opened
        config = sweep.inputs[best.number].config
        there = ended(config, best.folder, sweep.uri, record.run_id, sweep.experiment_id, version)
    own = Ended(sweep.uri, sweep.experiment_id, sweep.run_id, resume=resume_command(sweep.run_dir))
    if there and version:
        more = 2 * len(sweep.trials)
        try:
            replace(sweep.config, trials=more).values()
            further = "" if sweep.config.grid else f"{own.resume} --trials {more}"
        except ConfigError:  # the search space has no more values
            further = ""
        own = replace(there, run_id=sweep.run_id, resume=further)
    for line in lines(own):
        sweep.console.say(line)


def end(sweep: Sweep, status: str) -> None:
    """Ends the MLflow runs of the sweep and of trials that have not ended."""
    for folder in (*(trial.folder for trial in sweep.trials), sweep.run_dir):
        if not (folder / ENDING).exists():
            end_run(sweep, folder, status)


def end_run(sweep: Sweep, folder: Path, status: str) -> None:
    """Ends the MLflow run that the folder names, if it names one; prints a warning if that fails."""
    try:
        if found := read_record(folder / RUN):
            tracking.finish_run(sweep.uri, found.run_id, status)
    except (RecordError, TrainingError) as error:
        sweep.console.say(f"warning: the end of {folder.name} could not be recorded: {error}")


def _spooled(sweep: Sweep) -> Spool:
    """A spool with the best result so far after each trial."""
    spool = Spool(sweep.run_dir / "spool", sweep.run_id, sweep.uri)
    until = math.inf
    for trial in sweep.trials:
        until = min(until, trial.best()["bits_per_byte"])
        if math.isfinite(until):
            spool.metrics(trial.number, {"best_bits_per_byte": until})
    return spool


def _session(sweep: Sweep, trial: Trial) -> Session:
    """The session of a trial that has ended, so that its model can be registered."""
    inputs = sweep.inputs[trial.number]
    return Session(
        inputs.config,
        trial.folder,
        inputs,
        sweep.uri,
        _record(trial).run_id,
        sweep.experiment_id,
        History(trial.folder / "history.jsonl"),
        sweep.console,
        sweep.stops,
    )


def _record(trial: Trial) -> Record:
    record = read_record(trial.folder / RUN)
    assert record, "a trial that has ended was opened"
    return record


def _figures(sweep: Sweep, best: Trial) -> Sequence[Path]:
    """Draws the curves of all trials, and the best result so far by trial."""
    folder = sweep.run_dir / "figures"
    folder.mkdir(exist_ok=True)
    curves = {f"{trial.number:02}": trial.evaluations() for trial in sweep.trials}
    figures.sweep_curves(curves, f"{best.number:02}", folder / "trials.png")
    figures.best_so_far([trial.best()["bits_per_byte"] for trial in sweep.trials], folder / "best_so_far.png")
    return folder / "trials.png", folder / "best_so_far.png"
