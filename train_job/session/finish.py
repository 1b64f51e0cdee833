"""After the last step: the best checkpoint becomes a package, and the package a registered version.

In: a `Session` and how its training ended. Out: files in the run's folder and in MLflow, an exit code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from gptcore.errors import CheckpointError, FoundryError, PackageError, RecordError, TrainingError
from gptcore.lora import Merged, save_adapter
from gptcore.package import Package, open_package, save_package
from gptcore.progress import doing
from gptcore.redact import without_password
from train_job import figures
from train_job.config import TrainConfig
from train_job.data.inputs import cache_dir
from train_job.files import read_json, write_json
from train_job.session.record import CONFIG
from train_job.session.report import show, target_metrics, targets, what_now
from train_job.session.session import Session, Trained, resume_command
from train_job.tracking import registry
from train_job.tracking import runs as tracking
from train_job.tracking.spool import Spool
from train_job.training.checkpoint import StoredModel, TrainState, verified
from train_job.training.evaluate import bits_per_byte
from train_job.training.hardware import peak_memory_mb
from train_job.training.storage import StoredCheckpoint, checkpoints, drop_all_but, first_whole
from train_job.training.targets import TargetStatus

OUTCOME = "outcome.json"
"""In a finished run's folder: the version that it was registered as, and the config that led there."""
ADAPTER = "adapter"
"""In the folder of a run that trained adapters: what PEFT loads beside the base."""
PATIENCE_SECONDS = 60.0
"""How long the end of a run waits for a tracking server that is away."""


def finish(session: Session, trained: Trained) -> int:
    """Registers a finished run's model, or records why there is none; returns the exit code."""
    if trained.problem and not session.stops.number:
        return fail(session, trained, trained.problem)
    if session.stops.number:
        if trained.problem:  # a consequence of the stop, such as a cluster that was told to end
            session.console.say(f"error: {trained.problem}")
        _deliver(session, trained, [session.console.path])
    session.stops.check()
    return register(session, trained, build(session, trained))


def fail(session: Session, trained: Trained, problem: FoundryError) -> int:
    """Prints and records why the run failed; returns the exit code."""
    session.console.say(f"error: {problem}")
    what_now(session)
    try:
        close(session, trained, "FAILED", [session.console.path])
    except (FoundryError, OSError):  # a full disk cannot hold the spool either
        end(session, "FAILED")
    return failure_code(problem, bool(trained.began))


def failure_code(problem: FoundryError, began: bool) -> int:
    """The exit code of a failed run: 2 if the input was wrong, which it cannot be once a worker `began`; else 1."""
    return 1 if isinstance(problem, TrainingError) or began else 2


def register(session: Session, trained: Trained, package: Package, tell_what_now: bool = True) -> int:
    """Registers the run's package as a version; returns the exit code."""
    config, say = session.config, session.console.say
    pictures = _figures(session, package)
    session.stops.check()
    corpus = session.inputs.validation_corpus
    try:
        published = registry.publish(
            session.uri,
            session.run_id,
            package,
            registry.Validation(corpus.fingerprint, lambda judged: bits_per_byte(judged, corpus, cache_dir(config))),
            name=config.register_as,
            promote=config.promote,
            bits_per_byte=package.info["training"]["bits_per_byte"],
            step=package.info["training"]["step"],
        )
    except FoundryError as error:
        say(f"error: {error}")
        say(f"the package is whole in {package.path}; register it with: {resume_command(config)}")
        if tell_what_now:
            what_now(session)
        close(session, trained, "FAILED", [*pictures, session.console.path])
        return 1
    record = asdict(published) | {"targets": targets(config, trained), "config": config.flat()}
    record |= {"experiment_id": session.experiment_id}
    if not published.new:
        say(f"nothing new to register: {_why_nothing_new(trained, package)}")
    memory = {"driver memory": peak_memory_mb()["memory"]} | dict(trained.worker_memory)
    say(f"memory    peak: {', '.join(f'{k} {v:,.0f} MiB' for k, v in memory.items())}")
    show(say, package, record, config)
    if tell_what_now:
        what_now(session, record)
    session.stops.check(last=True)
    adapter = sorted((session.run_dir / ADAPTER).glob("*"))
    close(session, trained, "FINISHED", [*pictures, *adapter, session.run_dir / CONFIG, session.console.path])
    write_json(session.run_dir / OUTCOME, record)  # last: a run that has it is finished in every respect
    return 0


def _why_nothing_new(trained: Trained, package: Package) -> str:
    began, finished = trained.began, trained.finished
    if began and finished and began.step == finished.step:
        return f"{finished.reason} is met at step {finished.step} already, so no step was added"
    return f"step {package.info['training']['step']} is still the best"


def preferred(found: Iterable[StoredCheckpoint], targets: Iterable[TargetStatus]) -> list[StoredCheckpoint]:
    """Evaluated checkpoints in the order in which they should become the package: the lowest validation loss first.

    If a target training loss was reached, the last checkpoint is first: it is the one that reached it.
    """
    reached = any(standing.target == "target_train_loss" and standing.reached for standing in targets)
    judged = [kept for kept in found if kept.loss < math.inf]
    return sorted(judged, key=lambda kept: (-kept.step if reached else kept.loss, kept.step))


def build(session: Session, trained: Trained) -> Package:
    """Makes a package of the best checkpoint that is whole and removes checkpoints that are not needed.

    Raises CheckpointError if there is none.
    """
    config, say = session.config, session.console.say
    found = checkpoints(config)
    standings = trained.finished.targets if trained.finished else ()
    choice = first_whole(preferred(found, standings), lambda folder: _package(session, folder), say)
    if choice is None:
        why = next((f": {kept.why}" for kept in found if kept.why), "")
        raise CheckpointError(f"run {config.name} has left no evaluated checkpoint in {config.storage_path}{why}")
    kept, package = choice
    drop_all_but(kept, found, config, say)
    return package


def _package(session: Session, checkpoint: Path) -> Package:
    """Makes the package from a checkpoint's folder. Raises DamagedCheckpoint if it is damaged."""
    config, inputs = session.config, session.inputs
    kept = TrainState(**verified(checkpoint)["state"])
    step, loss = kept.step, kept.loss
    bits = loss * (inputs.validation.num_targets) / math.log(2) / inputs.validation.num_bytes
    training = {
        "run": config.name,
        "run_id": session.run_id,
        "step": step,
        "tokens": step * config.batch_size * config.context,
        "sequence_length": config.context,
        "validation_loss": loss,
        "bits_per_byte": bits,
        "objective": config.objective if config.objective != "text" else None,
        "data": inputs.train_corpus.name,
        "data_fingerprint": inputs.train_corpus.fingerprint,
        "validation_fingerprint": inputs.validation_corpus.fingerprint,
        "parent": config.init_from,
        "parent_bits_per_byte": session.history.untrained_bits_per_byte if config.init_from else None,
    }
    summary = {k: v for k, v in training.items() if v is not None}
    state: Mapping[str, Tensor] = StoredModel(checkpoint)
    with doing("making the package"):
        if config.lora and inputs.parent:
            name = str(config.init_from)
            # PEFT takes a name on the hub, or a folder.
            base = name.removeprefix("hf:") if name.startswith("hf:") else str(inputs.parent.path)
            if inputs.parent.weights:
                session.console.say(
                    f"no adapter for PEFT: it cannot open {base}, whose weights are {inputs.parent.weights}"
                )
            else:
                save_adapter(session.run_dir / ADAPTER, inputs.parent, base, state, config.lora)
            state = Merged(inputs.parent, state, config.lora)
        return save_package(session.run_dir / "package", inputs.model, state, inputs.tokenizer, summary)


def _figures(session: Session, package: Package) -> list[Path]:
    """Draws the loss curve, and what temperature and decoding strategies do to the next token's probabilities."""
    folder = session.run_dir / "figures"
    with doing("drawing figures"):
        odds = figures.draw_odds(package, session.config.sample_prompts[0], folder)
        figures.loss_curve(session.history.rows, folder / "loss_curve.png")
    return [folder / "loss_curve.png", *odds]


def ended_with(run_dir: Path, config: TrainConfig) -> tuple[Package, dict[str, Any]] | None:
    """A finished run's package and outcome if the same config is asked for again; None if there is something to do.

    If either is damaged, a line says so and the run is registered again.
    """
    if not (run_dir / OUTCOME).exists():
        return None
    try:
        record = read_json(run_dir / OUTCOME, "the run is registered again")
        if record.get("config") != config.flat():
            return None
        if lacking := {"name", "version", "promoted", "reason"} - record.keys():
            raise RecordError(f"{run_dir / OUTCOME} lacks {min(lacking)!r}; the run is registered again")
        return open_package(run_dir / "package"), record
    except (PackageError, RecordError) as error:
        print(error)
        return None


def close(session: Session, trained: Trained, status: str, files: list[Path]) -> None:
    """Delivers what MLflow still lacks and ends its run; a stop signal comes too late from here on."""
    session.stops.late = True
    _deliver(session, trained, files)
    end(session, status)


def _deliver(session: Session, trained: Trained, files: list[Path]) -> None:
    spool = Spool(session.run_dir / "spool", session.run_id, session.uri)
    memory = {f"{tracking.PEAK} driver memory": peak_memory_mb()["memory"]}
    spool.metrics(session.history.last_step, memory | target_metrics(trained))
    deliver(spool, files, session.console.say)


def deliver(spool: Spool, files: list[Path], say: Callable[[str], None]) -> None:
    """Waits up to PATIENCE_SECONDS until MLflow has every point and these files; prints what it still lacks."""
    for file in files:
        of_adapter = file.parent == spool.folder.parent / ADAPTER
        folder = ADAPTER if of_adapter else "figures" if file.suffix == ".png" else None
        spool.artifact(file, folder, table=file.suffix == ".json" and folder is None)
    with doing(f"sending points and files to MLflow at {without_password(spool.tracking_uri)}"):
        left = spool.close(PATIENCE_SECONDS)
    if left:
        say(
            f"the tracking server is away: {left} lines wait; deliver them with "
            f"python -m train_job.tracking deliver {spool.folder}"
        )


def end(session: Session, status: str) -> None:
    """Ends the MLflow run as FINISHED, FAILED or KILLED; prints a warning if the server is away."""
    try:
        with doing(f"recording the run's end at {without_password(session.uri)}"):
            tracking.finish_run(session.uri, session.run_id, status)
    except TrainingError as error:
        session.console.say(f"warning: the run's end could not be recorded: {error}")
