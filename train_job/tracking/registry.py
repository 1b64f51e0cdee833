"""Registers a finished package as a version in MLflow, and decides whether it becomes @champion.

In: a run, its package, and the validation text. Out: a registered version that `mlflow.pyfunc.load_model` reads. Its
tags have its score, the validation text's fingerprint, and whether and why it became champion. Champion and candidate
are compared by bits per byte on the same text, so their tokenizers may differ.
"""

import importlib.metadata
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gptcore
from gptcore.errors import ConfigError, FoundryError, HubError, did_you_mean
from gptcore.files import sha256
from gptcore.hub import resolve
from gptcore.package import WEIGHTS, Package, describe, open_package
from gptcore.parameters import SAMPLING
from gptcore.progress import doing
from gptcore.redact import without_password
from train_job.files import locked
from train_job.tracking.client import mlflow_client, request_limits, translated_errors
from train_job.tracking.pages import model_note

MODES = ("if-better", "always", "never")
CHAMPION = "champion"
REQUIREMENTS = ("numpy", "psutil", "safetensors", "tiktoken", "tokenizers", "torch")  # what gptcore needs to predict


@dataclass(frozen=True)
class Validation:
    """The validation text: its fingerprint, and a function that gives a package's bits per byte on it."""

    fingerprint: str
    judge: Callable[[Package], float]


@dataclass(frozen=True)
class Decision:
    """Whether to promote, and why."""

    promote: bool
    reason: str


@dataclass(frozen=True)
class Published:
    """A version, and the decision on it. It is `new` unless the run had registered these weights before."""

    name: str
    version: str
    promoted: bool
    reason: str
    bits_per_byte: float
    new: bool = True


@dataclass(frozen=True)
class Champion:
    """The version with @champion, and its bits per byte on our validation text, or None and the `problem`."""

    version: str
    bits_per_byte: float | None
    problem: str = ""
    evaluated_here: bool = False


@dataclass(frozen=True)
class Candidate:
    """A version that may become @champion, and its recorded bits per byte on our validation text."""

    name: str
    version: str
    package: Package
    bits_per_byte: float


def decide(mode: str, bits_per_byte: float, champion: Champion | None) -> Decision:
    """Whether a model with this `bits_per_byte` becomes @champion. Raises ConfigError for an unknown mode."""
    _check_mode(mode)
    ours = f"{bits_per_byte:.4f} bits per byte"
    if mode != "if-better":
        return Decision(mode == "always", f"promotion was set to {mode!r} ({ours})")
    if not math.isfinite(bits_per_byte):
        return Decision(False, f"{ours} is not finite")
    if champion is None:
        return Decision(True, f"{ours}, and there was no champion yet")
    if champion.bits_per_byte is None:
        return Decision(
            False, f"{ours}, but champion version {champion.version} cannot be evaluated: {champion.problem}"
        )
    better = bits_per_byte < champion.bits_per_byte
    theirs = f"{champion.bits_per_byte:.4f} of champion version {champion.version} on the same text"
    return Decision(better, f"{ours} is {'better' if better else 'no better'} than the {theirs}")


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ConfigError(f"promote is {mode!r}; expected {', '.join(MODES)}.{did_you_mean(mode, MODES)}")


def publish(
    uri: str,
    run_id: str,
    package: Package,
    validation: Validation,
    *,
    name: str = "gpt",
    promote: str = "if-better",
    bits_per_byte: float | None = None,
    step: int = 0,
) -> Published:
    """Logs the package with the run, registers it as a version of `name`, and moves @champion if the package is better.

    `bits_per_byte` is the package's figure on the whole validation text, computed here if it is None; MLflow shows the
    metrics of `step` beside the model. Weights that this run has registered under `name` before are not registered
    again: the decision on them stands, unless it was made in another mode or the publication was interrupted; that is
    completed now. Raises TrainingError if MLflow refuses or is away.
    """
    import mlflow

    _check_mode(promote)  # before anything is registered
    if bits_per_byte is None:
        bits_per_byte = validation.judge(package)
    weights = sha256(package.path / WEIGHTS)
    mlflow.set_tracking_uri(uri)  # logging a model uses only the process-wide URI
    with translated_errors(uri):
        client = mlflow_client(uri)
        with request_limits(timeout_s=30, retries=3):  # a server that is away is known by now, not after minutes
            earlier = _registered_before(client, run_id, name, weights)
        if earlier is not None and earlier.tags.get("promotion_mode") == promote:
            promoted, reason = earlier.tags["promoted"] == "true", earlier.tags["promotion_reason"]
            return Published(name, str(earlier.version), promoted, reason, bits_per_byte, new=False)
        if earlier is None:
            run = client.get_run(run_id)
            parents = package.info.get("training", {}).get("parent_bits_per_byte")
            tags = {
                **({} if parents is None else {"parent_bits_per_byte": repr(parents)}),
                "bits_per_byte": repr(bits_per_byte),
                "validation_fingerprint": validation.fingerprint,
                "weights_sha256": weights,
                **_origin_tags(run),
            }
            with doing(f"registering the package as a version of {name}"):
                version = _register(run, package, name, tags, step)
        else:
            version = str(earlier.version)
        client.update_model_version(name, version, description=describe(package))
        if not client.get_registered_model(name).description:
            client.update_registered_model(name, model_note(name))
        decision = _decide_and_promote(
            client, uri, promote, Candidate(name, version, package, bits_per_byte), validation
        )
        client.set_model_version_tag(name, version, "promoted", str(decision.promote).lower())
        client.set_model_version_tag(name, version, "promotion_reason", decision.reason)
        client.set_model_version_tag(name, version, "promotion_mode", promote)  # last: marks the decision as complete
    return Published(name, version, decision.promote, decision.reason, bits_per_byte, new=earlier is None)


def _registered_before(client: Any, run_id: str, name: str, weights: str) -> Any:
    """The version of `name` that this run registered with these weights, or None."""
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        if version.name == name and version.tags.get("weights_sha256") == weights:
            return version
    return None


def _decide_and_promote(client: Any, uri: str, mode: str, candidate: Candidate, validation: Validation) -> Decision:
    """Decides, and moves @champion if the candidate wins.

    Another job may move the alias during the evaluation; then the candidate is compared with the new champion. With an
    sqlite database, jobs check and move the alias one at a time, under a lock file beside it. A server's API has no
    such operation, so the alias is read before and after it is moved. One race remains: if two jobs move it within the
    same two requests, the later one wins, even if it is worse, if the earlier one has done its second read by then.
    Versions, figures and reasons are right in any case, and the next run compares with the current champion.
    """
    name, version = candidate.name, candidate.version
    while True:
        holder = _holder(client, name)
        if holder is not None and str(holder.version) == version:
            recorded = holder.tags.get("promoted") == "true"
            return Decision(True, holder.tags["promotion_reason"] if recorded else "it is the champion")
        champion = _evaluate_champion(holder, uri, validation) if holder is not None and mode == "if-better" else None
        # If the champion is evaluated here, evaluate the candidate in the same way.
        here = champion is not None and champion.evaluated_here
        with doing("evaluating the new model in the same way"):
            ours = validation.judge(candidate.package) if here else candidate.bits_per_byte
        decision = decide(mode, ours, champion)
        if not decision.promote:
            return decision
        with _alias_lock(uri):
            if _version(_holder(client, name)) == _version(holder):
                client.set_registered_model_alias(name, CHAMPION, version)
                if _version(_holder(client, name)) == version:
                    return decision


def _alias_lock(uri: str) -> AbstractContextManager[None]:
    """Holds the lock for moving an alias in an sqlite database; does nothing for a server."""
    database = Path(uri.removeprefix("sqlite:///"))
    return locked(database.with_name(f"{database.name}.gate")) if uri.startswith("sqlite:///") else nullcontext()


def pin(model: str, uri: str) -> str:
    """Turns `models:/NAME@ALIAS` into `models:/NAME/VERSION`, so that a resumed run starts from the same version.

    Raises HubError if no version has the alias.
    """
    name, at, alias = model.removeprefix("models:/").partition("@")
    if not (at and model.startswith("models:/")):
        return model
    import mlflow

    try:
        version = mlflow_client(uri).get_model_version_by_alias(name, alias)
    except mlflow.MlflowException as error:
        raise HubError(
            f"no model {name!r} with the alias {alias!r} is registered at {without_password(uri)}"
        ) from error
    return f"models:/{name}/{version.version}"


def _holder(client: Any, name: str) -> Any:
    """The version with @champion, or None."""
    from mlflow import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no such model; no such alias
            return None
        raise


def _version(holder: Any) -> str | None:
    return None if holder is None else str(holder.version)


def _evaluate_champion(holder: Any, uri: str, validation: Validation) -> Champion:
    """The champion on our validation text: its recorded figure if it is for the same text, else evaluated here."""
    if holder.tags.get("validation_fingerprint") == validation.fingerprint and "bits_per_byte" in holder.tags:
        return Champion(str(holder.version), float(holder.tags["bits_per_byte"]))
    try:
        package = open_package(resolve(f"models:/{holder.name}/{holder.version}", uri))
        what = f"the champion, {holder.name} version {holder.version}, on this run's validation text"
        with doing(f"evaluating {what}", at_once=True):
            return Champion(str(holder.version), validation.judge(package), evaluated_here=True)
    except FoundryError as error:
        return Champion(str(holder.version), None, without_password(str(error)))


def _origin_tags(run: Any) -> dict[str, str]:
    """Tags of the version that say where the model comes from, taken from the run."""
    names = {"git_commit": "mlflow.source.git.commit", "git_dirty": "git.dirty", "parent": "parent", "sweep": "sweep"}
    tags = {ours: run.data.tags[theirs] for ours, theirs in names.items() if theirs in run.data.tags}
    for used in run.inputs.dataset_inputs:
        if any(tag.value == "train" for tag in used.tags):
            tags["data"] = used.dataset.name
            tags["data_fingerprint"] = json.loads(used.dataset.profile)["fingerprint"]
    return tags


def _register(run: Any, package: Package, name: str, tags: dict[str, str], step: int) -> str:
    """Logs the package's files (no pickle) as a pyfunc model and registers it; returns the version."""
    import mlflow.models

    mlflow.set_experiment(experiment_id=run.info.experiment_id)  # else the model is stored under "Default"
    # MLflow runs the example once before it uploads, so a package that cannot generate is not registered.
    example = ({"prompt": "Once upon a time"}, {"max_new_tokens": 8, "temperature": 0.0})
    logged = mlflow.models.Model.log(  # as pyfunc.log_model, but for a run that is not the active one
        artifact_path=None,
        name="model",
        flavor=mlflow.pyfunc,
        run_id=run.info.run_id,
        registered_model_name=name,
        tags=tags,
        step=step,
        loader_module="gptcore.pyfunc",
        data_path=str(package.path),
        code_paths=[str(Path(gptcore.__file__).parent)],
        pip_requirements=_requirements(),
        signature=_signature(),
        input_example=example,
    )
    return str(logged.registered_model_version)


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    types = {int: DataType.long, float: DataType.double, bool: DataType.boolean, str: DataType.string}
    params = [
        ParamSpec(param.name, types[param.type], list(param.default), (-1,))
        if param.several
        else ParamSpec(param.name, types[param.type], param.default)
        for param in SAMPLING.values()
    ]
    text = Schema([ColSpec(DataType.string)])
    return ModelSignature(Schema([ColSpec(DataType.string, "prompt")]), text, ParamSchema(params))


def _requirements() -> list[str]:
    """Exact versions, without build labels such as +cpu, which package indexes do not have."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]
