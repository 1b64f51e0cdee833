"""Training state on disk: a folder that is either whole or not there.

In: tensors and a small record. Out: `model.safetensors`, `optimizer.safetensors` and `state.json`, which names the
sha256 of both and of itself. Nothing is pickled. There is no RNG state and no data position to save: weights at step 0,
dropout and the batch of a step are functions of (seed, step), so the step number restores them.
"""

import hashlib
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

from gptcore.errors import CheckpointError, DamagedCheckpoint, StorageFull, TrainingError
from train_job.files import sha256, storage_problem

FORMAT = 1
STATE = "state.json"
FILES = (STATE, "model.safetensors", "optimizer.safetensors")


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
    last_loss: float = float("inf")
    """Their validation loss."""

    @property
    def loss(self) -> float:
        """The validation loss of this step's weights, in nats per token; infinite if they were not judged."""
        if self.last_evaluated != self.step:
            return float("inf")
        return self.best_loss if self.best_step == self.step else self.last_loss


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
    """Writes beside `folder`, then renames. Raises TrainingError, leaving nothing, if the disk does not take it."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        files = {}
        for name, tensors in (("model.safetensors", model), ("optimizer.safetensors", optimizer)):
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, partial / name)
            files[name] = sha256(partial / name)
        record = {"format": FORMAT, "state": asdict(state), "identity": asdict(identity), "files": files}
        (partial / STATE).write_text(json.dumps(record | {"sha256": _digest(record)}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise (unsaved(error, folder.parent) or error) from None


def unsaved(error: BaseException, place: object) -> TrainingError | None:
    """The error to show if a checkpoint could not be put at `place` since that takes nothing; None if it is another."""
    problem = storage_problem(error, place)
    if isinstance(problem, StorageFull):
        return StorageFull(
            f"the disk is full: no room for a checkpoint in {place}; the last one is whole. Free some space there"
        )
    return problem and TrainingError(f"{problem}; the last checkpoint is whole")


def load_checkpoint(folder: Path, identity: Identity) -> Checkpoint:
    """Reads and verifies. Raises DamagedCheckpoint, naming the file, or CheckpointError if it is of another run."""
    record = verified(folder)
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
    """The parameters alone, tied ones once. Raises DamagedCheckpoint if the checkpoint is not whole."""
    if verify:
        verified(folder)
    return load_file(folder / "model.safetensors")


def parse_state(text: bytes, where: object) -> dict[str, Any]:
    """The record in a state.json. Raises DamagedCheckpoint, or CheckpointError if it is of another format."""
    try:
        record: dict[str, Any] = json.loads(text)
        expected, format_version = record.pop("sha256", None), record["format"]
        if format_version == FORMAT:
            Identity(**record["identity"]), TrainState(**record["state"]), dict(record["files"])
            if expected not in (None, _digest(record)):  # checkpoints of earlier versions have none
                raise ValueError("it was altered")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where} is damaged ({error})") from None
    if format_version != FORMAT:
        raise CheckpointError(f"{where} has checkpoint format {format_version}; this version reads {FORMAT}")
    return record


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def verified(folder: Path) -> dict[str, Any]:
    """state.json's record, once every file was found to be as it says. Raises DamagedCheckpoint, naming the file."""
    file = folder / STATE
    try:
        record = parse_state(file.read_bytes(), file)
        for name, digest in record["files"].items():
            file = folder / name
            if sha256(file) != digest:
                raise DamagedCheckpoint(f"{file} is cut short or altered")
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{file} is missing") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{file} cannot be read: {error.strerror or error}") from None
    return record
