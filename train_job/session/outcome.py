"""After the last step: the best checkpoint becomes a package, the package a registered version, and the user is told.

In: a finished, stopped or failed run. Out: files in the run's folder and in MLflow, an exit code.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import CheckpointError, FoundryError, PackageError, RecordError, TrainingError
from gptcore.package import Package, open_package, save_package
from gptcore.progress import doing
from gptcore.redact import without_password
from gptcore.sampling import SamplingParams, generate_text
from gptcore.units import duration
from train_job import figures
from train_job.config import LIMITS, TrainConfig
from train_job.data.inputs import cache_dir
from train_job.files import read_json, written_whole
from train_job.session.history import read_history
from train_job.session.record import read_record, tracked_at
from train_job.session.whatnow import Ended, lines
from train_job.tracking import registry
from train_job.tracking import runs as tracking
from train_job.tracking.spool import Spool
from train_job.training.checkpoint import load_model
from train_job.training.evaluate import bits_per_byte
from train_job.training.hardware import peak_memory_mb
from train_job.training.storage import StoredCheckpoint, checkpoints, drop_all_but, first_whole
from train_job.training.targets import TargetStatus

if TYPE_CHECKING:
    from train_job.run import Run

OUTCOME = "outcome.json"
"""In a finished run's folder: the version that it was registered as, and the config that led there."""
PATIENCE_SECONDS = 60.0
"""How long the end of a run waits for a tracking server that is away."""


def conclude(run: Run) -> int:
    """Registers a finished run's model, or records why there is none; returns the exit code."""
    if run.problem and not run.stops.number:
        return fail(run, run.problem)
    if run.stops.number:
        if run.problem:  # what came of the stop, as where the whole cluster was told to end
            run.console.say(f"error: {run.problem}")
        _deliver(run, [run.console.path])
    run.stops.check()
    return register(run, build(run))


def fail(run: Run, problem: FoundryError) -> int:
    """Says what the run failed of and records that; returns the exit code: 2 if it is the input, 1 if it is not.

    Once a worker has begun to train, nothing is the input's fault any more.
    """
    run.console.say(f"error: {problem}")
    what_now(run)
    try:
        if run.run_id:
            close(run, "FAILED", [run.console.path])
    except (FoundryError, OSError):  # a disk that is full takes no spool either
        end(run, "FAILED")
    return 1 if isinstance(problem, TrainingError) or run.began else 2


def register(run: Run, package: Package, tell_what_now: bool = True) -> int:
    """Makes the run's package a version and tells the user; returns the exit code."""
    pictures = _figures(run, package)
    run.stops.check()
    try:
        published = registry.publish(
            run.uri,
            run.run_id,
            package,
            registry.Validation(
                run.inputs.validation_corpus.fingerprint,
                lambda judged: bits_per_byte(judged, run.inputs.validation_corpus, cache_dir(run.config)),
            ),
            name=run.config.register_as,
            promote=run.config.promote,
            bits_per_byte=package.info["training"]["bits_per_byte"],
            step=package.info["training"]["step"],
        )
    except FoundryError as error:
        run.console.say(f"error: {error}")
        run.console.say(f"the package is whole in {package.path}; register it with: {run.resume_command()}")
        if tell_what_now:
            what_now(run)
        close(run, "FAILED", [*pictures, run.console.path])
        return 1
    record = asdict(published) | {"targets": _targets(run), "config": run.config.flat()}
    record |= {"experiment_id": run.experiment_id}
    if not published.new:
        run.console.say(f"nothing new to register: {_why_nothing_new(run, package)}")
    _tell(run, run.result.return_value or {} if run.result else {})
    show(run.console.say, package, record, run.config)
    if tell_what_now:
        what_now(run, record)
    run.stops.check(last=True)
    close(run, "FINISHED", [*pictures, run.run_dir / "config.yaml", run.console.path])
    with written_whole(run.run_dir / OUTCOME) as file:  # last: a run that has it is finished in every respect
        file.write(json.dumps(record, indent=1).encode())
    return 0


def _why_nothing_new(run: Run, package: Package) -> str:
    if run.began and run.finished and run.began.step == run.finished.step:
        return f"{run.finished.reason} is met at step {run.finished.step} already, so no step was added"
    return f"step {package.info['training']['step']} is still the best"


def preferred(found: Iterable[StoredCheckpoint], targets: list[TargetStatus]) -> list[StoredCheckpoint]:
    """Judged checkpoints by how much each should become the package: the one of the lowest validation loss first.

    Where a training loss was asked for and reached, the one that has it is first: the last.
    """
    learned = any(standing.target == "target_train_loss" and standing.reached for standing in targets)
    judged = [kept for kept in found if kept.loss < math.inf]
    return sorted(judged, key=lambda kept: (-kept.step if learned else kept.loss, kept.step))


def build(run: Run) -> Package:
    """The preferred checkpoint that is whole, as a model package; checkpoints that are not needed are removed."""
    found = checkpoints(run.config)
    choice = first_whole(preferred(found, _standings(run)), load_model, run.console.say)
    if choice is None:
        why = next((f": {kept.why}" for kept in found if kept.why), "")
        where = run.config.storage_path
        raise CheckpointError(f"run {run.config.name} has left no evaluated checkpoint in {where}{why}")
    kept, state = choice
    package = _package(run, state, kept.step, kept.loss)
    drop_all_but(kept, found, run.config, run.console.say)
    return package


def _package(run: Run, state: dict[str, Any], step: int, loss: float) -> Package:
    inputs = run.inputs
    bits = loss * (inputs.validation.num_tokens - 1) / math.log(2) / inputs.validation.num_bytes
    training = {
        "run": run.config.name,
        "run_id": run.run_id,
        "step": step,
        "tokens": step * run.config.batch_size * run.config.context,
        "sequence_length": run.config.context,
        "validation_loss": loss,
        "bits_per_byte": bits,
        "data": inputs.train_corpus.name,
        "data_fingerprint": inputs.train_corpus.fingerprint,
        "validation_fingerprint": inputs.validation_corpus.fingerprint,
        "parent": run.config.init_from,
        "parent_bits_per_byte": run.history.untrained_bits_per_byte if run.config.init_from else None,
    }
    summary = {k: v for k, v in training.items() if v is not None}
    with doing("making the package"):
        return save_package(run.run_dir / "package", inputs.model, state, inputs.tokenizer, summary)


def _standings(run: Run) -> list[TargetStatus]:
    """The run's targets, but for those whose figure was never taken."""
    return [s for s in (run.finished.targets if run.finished else ()) if math.isfinite(s.best)]


def _targets(run: Run) -> list[dict[str, Any]]:
    """The run's targets as outcome.json has them: step and seconds of one that was reached; how to go on, else."""
    found: list[dict[str, Any]] = []
    for standing in _standings(run):
        entry = asdict(standing) | {"figure": standing.figure, "missed_by": standing.missed_by}
        if standing.reached:
            entry |= {"reached_step": run.finished.step, "reached_seconds": run.finished.seconds}  # type: ignore[union-attr]
        elif run.finished and run.finished.reason in LIMITS:
            entry["go_on"] = f"{run.resume_command()} --{run.finished.reason.replace('_', '-')} N"
        found.append(entry)
    return found


def _target_figures(run: Run) -> dict[str, float]:
    """The same as metrics."""
    figures = {f"{standing.target}_missed_by": standing.missed_by for standing in _standings(run)}
    if run.finished and any(standing.reached for standing in _standings(run)):
        figures |= {"target_reached_step": run.finished.step, "target_reached_seconds": run.finished.seconds}
    return figures


def _target_text(target: dict[str, Any]) -> str:
    if "reached_step" in target:
        return (
            f"{target['figure']} reached at step {target['reached_step']} after "
            f"{duration(target['reached_seconds'])} ({target['best']:.4f})"
        )
    more = f"; more: {target['go_on']}" if "go_on" in target else ""
    return f"{target['figure']} not reached: the lowest was {target['best']:.4f}, {target['missed_by']:.4f} above{more}"


def _figures(run: Run, package: Package) -> list[Path]:
    """The loss curve, and what temperature and the decoding strategies do to the model's own next-token odds."""
    folder = run.run_dir / "figures"
    with doing("drawing figures"):
        odds = figures.draw_odds(package, run.config.sample_prompts[0], folder)
        figures.loss_curve(run.history.rows, folder / "loss_curve.png")
    return [folder / "loss_curve.png", *odds]


def _tell(run: Run, worker_memory: dict[str, float]) -> None:
    driver = peak_memory_mb()["memory"]
    memory = {"driver memory": driver} | worker_memory
    run.console.say(f"memory    peak: {', '.join(f'{k} {v:,.0f} MiB' for k, v in memory.items())}")


def show(say: Callable[[str], None], package: Package, record: dict[str, Any], config: TrainConfig) -> None:
    """The package, the version that it is, and a sample."""
    training = package.info["training"]
    say(f"package   {package.path}")
    say(f"          of step {training['step']}, {training['bits_per_byte']:.4f} bits/byte on the validation text")
    if "parent_bits_per_byte" in training:
        say(f"          its parent {training['parent']} needs {training['parent_bits_per_byte']:.4f} on it")
    for target in record.get("targets", ()):
        say(f"target    {_target_text(target)}")
    say(f"registry  {record['name']} version {record['version']}, {'now' if record['promoted'] else 'not'} @champion:")
    say(f"          {record['reason']}")
    params = SamplingParams(max_new_tokens=60, temperature=0.8, top_k=50, seed=config.seed)
    prompt = config.sample_prompts[0]
    say("sample    " + prompt + generate_text(package.load_model(), package.tokenizer, prompt, params))


def what_now(run: Run, record: Mapping[str, Any] | None = None) -> None:
    """Says how to go on from where the run is. `record` is what outcome.json has of one that ended well."""
    for line in lines(ended(run, record)):
        run.console.say(line)


def ended(run: Run, record: Mapping[str, Any] | None = None) -> Ended:
    """What there is when the run has ended."""
    package = run.run_dir / "package"
    resume = run.resume_command() if run.run_id else ""
    promoted = True if record is None else record["promoted"]
    rows = read_history(run.run_dir / "history.jsonl") if record else []
    step = int(max((row["step"] for row in rows), default=0))
    return Ended(
        run.uri,
        run.experiment_id,
        run.run_id,
        package if package.exists() else None,
        version=f"{record['name']} version {record['version']}" if record else "",
        promote="" if promoted else f"{resume} --promote always",
        resume=f"{resume} --max-steps {2 * step}" if record and step else resume,
        prompt=run.config.sample_prompts[0],
    )


def ended_with(run_dir: Path, config: TrainConfig) -> tuple[Package, dict[str, Any]] | None:
    """A finished run's package and outcome, if nothing new is asked of it; None if there is something to be done.

    If one of both is damaged, the end of the run is made again, and a line says so.
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


def show_again(run: Run, package: Package, record: dict[str, Any]) -> int:
    """What a finished run ended with; nothing is trained or registered."""
    print(f"run {run.config.name} is finished")
    show(print, package, record, run.config)
    found = None
    with contextlib.suppress(RecordError):  # it was registered; where it is tracked is not worth an error
        found = read_record(run.run_dir / "run.json")
    run.uri, run.run_id = tracked_at(found), found.run_id if found else ""
    run.experiment_id = record.get("experiment_id", "")
    for line in lines(ended(run, record)):
        print(line)
    return 0


def close(run: Run, status: str, files: list[Path]) -> None:
    """Delivers what is left and ends the MLflow run; too late for a stop."""
    run.stops.late = True
    _deliver(run, files)
    end(run, status)


def _deliver(run: Run, files: list[Path]) -> None:
    spool = Spool(run.run_dir / "spool", run.run_id, run.uri)
    spool.metrics(run.history.last_step, _driver_memory() | _target_figures(run))
    deliver(spool, files, run.console.say)


def deliver(spool: Spool, files: list[Path], say: Callable[[str], None]) -> None:
    """Waits a while until MLflow has every point and these files; says what a missing server kept from it."""
    for file in files:
        spool.artifact(file, "figures" if file.suffix == ".png" else None, table=file.suffix == ".json")
    with doing(f"bringing points and files to MLflow at {without_password(spool.tracking_uri)}"):
        left = spool.close(PATIENCE_SECONDS)
    if left:
        say(
            f"the tracking server is away: {left} lines wait; deliver them with "
            f"python -m train_job.tracking deliver {spool.folder}"
        )


def end(run: Run, status: str) -> None:
    """Ends the MLflow run, if there is one, as FINISHED, FAILED or KILLED; says so where the server is away."""
    if not run.run_id:
        return
    try:
        with doing(f"recording the run's end at {without_password(run.uri)}"):
            tracking.finish_run(run.uri, run.run_id, status)
    except TrainingError as error:
        run.console.say(f"warning: the run's end could not be recorded: {error}")


def _driver_memory() -> dict[str, float]:
    return {f"{tracking.PEAK} driver memory": peak_memory_mb()["memory"]}
