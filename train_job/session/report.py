"""What a run prints when it has ended: its package and version, its targets, a sample, and the commands to go on.

In: a `Session`, how its training ended, and what was registered. Out: lines, and the same facts as values.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptcore.errors import RecordError
from gptcore.package import Package
from gptcore.sampling import SamplingParams, generate_text
from gptcore.units import duration
from train_job.config import LIMITS, TrainConfig
from train_job.data.inputs import sample_prompt
from train_job.session.history import read_history
from train_job.session.record import RUN, read_record, tracked_at
from train_job.session.session import Session, Trained, resume_command
from train_job.session.whatnow import Ended, lines
from train_job.training.targets import TargetStatus


def targets(config: TrainConfig, trained: Trained) -> list[dict[str, Any]]:
    """The run's targets for outcome.json: step and seconds if reached, otherwise the command that trains longer."""
    found: list[dict[str, Any]] = []
    for standing in _standings(trained):
        entry = asdict(standing) | {"figure": standing.figure, "missed_by": standing.missed_by}
        assert trained.finished
        if standing.reached:
            entry |= {"reached_step": trained.finished.step, "reached_seconds": trained.finished.seconds}
        elif trained.finished.reason in LIMITS:
            entry["go_on"] = f"{resume_command(config)} --{trained.finished.reason.replace('_', '-')} N"
        found.append(entry)
    return found


def target_metrics(trained: Trained) -> dict[str, float]:
    """The same as metrics for MLflow."""
    standings = _standings(trained)
    metrics = {f"{standing.target}_missed_by": standing.missed_by for standing in standings}
    if trained.finished and any(standing.reached for standing in standings):
        metrics |= {"target_reached_step": trained.finished.step, "target_reached_seconds": trained.finished.seconds}
    return metrics


def _standings(trained: Trained) -> list[TargetStatus]:
    """The run's targets, without those whose figure was never measured."""
    return [s for s in (trained.finished.targets if trained.finished else ()) if math.isfinite(s.best)]


def _target_text(target: Mapping[str, Any]) -> str:
    if "reached_step" in target:
        return (
            f"{target['figure']} reached at step {target['reached_step']} after "
            f"{duration(target['reached_seconds'])} ({target['best']:.4f})"
        )
    more = f"; more: {target['go_on']}" if "go_on" in target else ""
    return f"{target['figure']} not reached: the lowest was {target['best']:.4f}, {target['missed_by']:.4f} above{more}"


def show(say: Callable[[str], None], package: Package, record: Mapping[str, Any], config: TrainConfig) -> None:
    """Prints the package, its version and a sample."""
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
    ids = sample_prompt(config, package.tokenizer, prompt)
    between = " " if config.objective == "chat" else ""
    say("sample    " + prompt + between + generate_text(package.load_model(), package.tokenizer, ids, params))


def show_again(config: TrainConfig, run_dir: Path, package: Package, record: Mapping[str, Any]) -> int:
    """Prints how a finished run ended, without training or registering; returns the exit code 0."""
    print(f"run {config.name} is finished")
    show(print, package, record, config)
    found = None
    with contextlib.suppress(RecordError):  # it was registered; its page is not worth an error
        found = read_record(run_dir / RUN)
    experiment_id = record.get("experiment_id", "")
    for line in lines(ended(config, run_dir, tracked_at(found), found.run_id if found else "", experiment_id, record)):
        print(line)
    return 0


def what_now(session: Session, record: Mapping[str, Any] | None = None) -> None:
    """Prints the commands that go on from here; `record` is the outcome of a run that was registered."""
    s = session
    for line in lines(ended(s.config, s.run_dir, s.uri, s.run_id, s.experiment_id, record)):
        s.console.say(line)


def ended(
    config: TrainConfig,
    run_dir: Path,
    uri: str,
    run_id: str = "",
    experiment_id: str = "",
    record: Mapping[str, Any] | None = None,
) -> Ended:
    """What there is when the run has ended; `run_id` is empty if it was never opened in MLflow."""
    package = run_dir / "package"
    resume = resume_command(config) if run_id else ""
    promoted = True if record is None else record["promoted"]
    rows = read_history(run_dir / "history.jsonl") if record else []
    step = int(max((row["step"] for row in rows), default=0))
    return Ended(
        uri,
        experiment_id,
        run_id,
        package if package.exists() else None,
        version=f"{record['name']} version {record['version']}" if record else "",
        promote="" if promoted else f"{resume} --promote always",
        resume=f"{resume} --max-steps {2 * step}" if record and step else resume,
        prompt=config.sample_prompts[0] if config.objective == "text" else "",
    )
