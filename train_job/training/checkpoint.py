"""Checkpoints: training state in a folder that is either complete or absent.

In: tensors and a small record. Out: `model.safetensors`, `optimizer.safetensors` and `state.json`, which has the sha256
of both and of itself. Nothing is pickled. No RNG state or data position is saved: initial weights, dropout and the
batch of a step are functions of (seed, step), so the step number restores them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcore.errors import CheckpointError, DamagedCheckpoint, StorageFull, TrainingError
from gptcore.files import sha256, whole_folder
from train_job.files import storage_problem

FORMAT = 1
STATE = "state.json"
FILES = (STATE, "model.safetensors", "optimizer.safetensors")


@dataclass
class TrainState:
    """The training state apart from the tensors."""

    step: int = 0
    elapsed: float = 0.0
    """Seconds since the run began, with evaluations, without the pauses between resumes."""
    best_loss: float = float("inf")
    best_step: int = 0
    since_best: int = 0
    """Evaluations since the best one."""
    best_train_loss: float = float("inf")
    """The lowest mean training loss between two logs."""
    last_evaluated: int = 0
    """The last step that was evaluated; 0 if none was."""
    last_loss: float = float("inf")
    """Its validation loss."""

    @property
    def loss(self) -> float:
        """The validation loss of this step, in nats per token; infinite if it was not evaluated."""
        if self.last_evaluated != self.step:
            return float("inf")
        return self.best_loss if self.best_step == self.step else self.last_loss


@dataclass(frozen=True)
class Identity:
    """Fingerprints of model shape, tokenizer and data, which a checkpoint and a run must share."""

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
    """Writes a folder that appears whole, or raises TrainingError and keeps the earlier one."""
    try:
        with whole_folder(folder, flush=False) as draft:  # the hashes tell of a power failure
            files = {}
            for name, tensors in (("model.safetensors", model), ("optimizer.safetensors", optimizer)):
                save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, draft / name)
                files[name] = sha256(draft / name)
            record = {"format": FORMAT, "state": asdict(state), "identity": asdict(identity), "files": files}
            (draft / STATE).write_text(json.dumps(record | {"sha256": _digest(record)}, indent=1))
    except (OSError, SafetensorError) as error:
        raise (save_problem(error, folder.parent) or error) from None


def save_problem(error: BaseException, place: object) -> TrainingError | None:
    """The error to show if `place` could not store a checkpoint; None for any other error."""
    problem = storage_problem(error, place)
    if isinstance(problem, StorageFull):
        return StorageFull(
            f"the disk is full: no space for a checkpoint in {place}; the last one is intact. Free some space there"
        )
    return problem and TrainingError(f"{problem}; the last checkpoint is intact")


def load_checkpoint(folder: Path, identity: Identity) -> Checkpoint:
    """Reads and verifies a checkpoint. Raises DamagedCheckpoint, or CheckpointError if it belongs to another run."""
    record = verified(folder)
    for what, theirs in record["identity"].items():
        ours = getattr(identity, what)
        if theirs != ours:
            raise CheckpointError(
                f"the checkpoint in {folder} is from a run with another {what} "
                f"(fingerprint {theirs[:12]}, expected {ours[:12]}); "
                "resume it with the settings it was made with"
            )
    state = TrainState(**record["state"])
    return Checkpoint(state, load_model(folder, verify=False), load_file(folder / "optimizer.safetensors"))


def load_model(folder: Path, verify: bool = True) -> dict[str, Tensor]:
    """The model's parameters, tied ones once. Raises DamagedCheckpoint if the checkpoint is damaged."""
    if verify:
        verified(folder)
    return load_file(folder / "model.safetensors")


def parse_state(text: bytes, where: object) -> dict[str, Any]:
    """Parses a state.json. Raises DamagedCheckpoint, or CheckpointError for another format version."""
    try:
        record: dict[str, Any] = json.loads(text)
        expected, format_version = record.pop("sha256", None), record["format"]
        if format_version == FORMAT:
            Identity(**record["identity"]), TrainState(**record["state"]), dict(record["files"])
            if expected not in (None, _digest(record)):  # earlier versions wrote none
                raise ValueError("it was changed")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where} is damaged ({error})") from None
    if format_version != FORMAT:
        raise CheckpointError(f"{where} has checkpoint format {format_version}; this version reads {FORMAT}")
    return record


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def verified(folder: Path) -> dict[str, Any]:
    """Checks every file against state.json and returns its record. Raises DamagedCheckpoint, naming the file."""
    file = folder / STATE
    try:
        record = parse_state(file.read_bytes(), file)
        for name, digest in record["files"].items():
            file = folder / name
            if sha256(file) != digest:
                raise DamagedCheckpoint(f"{file} is truncated or changed")
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{file} is missing") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{file} cannot be read: {error.strerror or error}") from None
    return record
