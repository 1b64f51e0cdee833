"""Training state on disk: a folder that is either whole or not there.

In: tensors and a small record. Out: `model.safetensors`, `optimizer.safetensors` and `state.json`, which names the
sha256 of both. Nothing is pickled. There is no RNG state and no data position to save: weights at step 0, dropout and
the batch of a step are functions of (seed, step), so the step number restores them.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcore.errors import CheckpointError, TrainingError
from train_job.files import sha256

FORMAT = 1


@dataclass
class TrainState:
    """Where a run stands, beside its tensors."""

    step: int = 0
    elapsed: float = 0.0
    """Seconds since the run began, evaluations included, pauses between resumes not."""
    best_loss: float = float("inf")
    best_step: int = 0
    since_best: int = 0
    """Evaluations since the best one."""
    best_train_loss: float = float("inf")
    """The lowest mean training loss between two logs."""
    last_evaluated: int = 0
    """The last step whose weights were judged; 0 if none were."""


@dataclass(frozen=True)
class Identity:
    """What must be the same for a checkpoint to fit a run: fingerprints of model shape, tokenizer and data."""

    model: str
    tokenizer: str
    data: str


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    state: TrainState
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def save_checkpoint(
    folder: Path, state: TrainState, identity: Identity, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
) -> None:
    """Writes beside `folder`, then renames. Raises TrainingError, leaving nothing, if the disk is full."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        files = {}
        for name, tensors in (("model.safetensors", model), ("optimizer.safetensors", optimizer)):
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, partial / name)
            files[name] = sha256(partial / name)
        record = {"format": FORMAT, "state": asdict(state), "identity": asdict(identity), "files": files}
        (partial / "state.json").write_text(json.dumps(record, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
            raise
        raise TrainingError(
            f"the disk is full: no room for a checkpoint in {folder.parent}; the last one is whole. "
            "Free some space, then go on with --resume"
        ) from None


def load_checkpoint(folder: Path, identity: Identity) -> Checkpoint:
    """Reads and verifies. Raises CheckpointError naming the file that is missing, altered, or of another run."""
    record = _verified(folder)
    for what, theirs in record["identity"].items():
        ours = getattr(identity, what)
        if theirs != ours:
            raise CheckpointError(
                f"the checkpoint in {folder} is of another {what} (fingerprint {theirs[:12]}, expected {ours[:12]}); "
                "resume it with the settings that it was made with"
            )
    state = TrainState(**record["state"])
    return Checkpoint(state, load_model(folder, verify=False), load_file(folder / "optimizer.safetensors"))


def load_model(folder: Path, verify: bool = True) -> dict[str, Tensor]:
    """The parameters alone, tied ones once. Raises CheckpointError if the checkpoint is not whole."""
    if verify:
        _verified(folder)
    return load_file(folder / "model.safetensors")


def _verified(folder: Path) -> dict[str, Any]:
    """state.json's record, once every file was found to be as it says."""
    try:
        record: dict[str, Any] = json.loads((folder / "state.json").read_text())
        Identity(**record["identity"]), TrainState(**record["state"])
        format_version, files = record["format"], dict(record["files"])
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint in {folder}: state.json is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'state.json'} is damaged ({error}); use an older checkpoint") from None
    if format_version != FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {format_version}; this version reads {FORMAT}")
    for name, digest in files.items():
        if not (folder / name).exists() or sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name} is missing, cut short or altered; use an older checkpoint")
    return record
