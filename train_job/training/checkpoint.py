"""Checkpoints: training state in a folder that is either complete or absent.

In: tensors, whole or sharded, and a small record. Out: a safetensors file from each worker, with its share of the
tensors, and `state.json`, which has the sha256 of each file and of itself, and is written last. Nothing is pickled. Any
number of workers reads it, each only the rows that it needs. No RNG state or data position is saved: initial weights,
dropout and the batch of a step are functions of (seed, step), so the step number restores them.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from gptcore.errors import CheckpointError, DamagedCheckpoint, StorageFull, TrainingError
from gptcore.files import sha256, write_file
from train_job.files import one_line, storage_problem

FORMAT = 2
READABLE = (1, 2)
"""Format 1 had all tensors in two files, which format 2's reader takes for a checkpoint of one worker."""
STATE = "state.json"
# Each worker reads by itself, which torch supposes is a mistake.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


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


def save_checkpoint(
    folder: Path,
    state: TrainState,
    identity: Identity,
    tensors: Mapping[str, Tensor],
    group: dist.ProcessGroup | None = None,
    upload: Callable[[Path], object] | None = None,
    sync: Callable[[], None] | None = None,
) -> None:
    """Writes a new folder. It is whole once it has a state.json; a failed one is removed.

    With a `group`, every worker must call it, and each writes what is in its `tensors`: its shards, and its share of
    what several have. Each file is passed to `upload` when it is complete, state.json last. `sync` is called before
    that. Raises TrainingError, on all workers, if one cannot write its share; else what `sync` raises.
    """
    rank = dist.get_rank(group) if group else 0
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        try:
            dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
            mine = list(folder.glob(f"shard-{rank + 1:05}-*"))  # none if there are fewer tensors than workers
            answer: Any = {file.name: sha256(file) for file in mine}
            if upload:
                for file in mine:
                    upload(file)
            if sync:
                sync()
        except (Exception, CheckpointException) as error:
            answer = _cause(error)
        answers = _gather(answer, group)
        for problem in answers:
            if isinstance(problem, BaseException):
                raise problem
        if rank == 0:
            files = {name: digest for each in answers for name, digest in each.items()}
            if not upload and (absent := [name for name in files if not (folder / name).exists()]):
                raise CheckpointError(
                    f"{absent[0]} was written to {folder.parent} on another machine. Expected a storage_path that all "
                    "machines share: a folder on network storage, or a URL"
                )
            record = {"format": FORMAT, "state": asdict(state), "identity": asdict(identity), "files": files}
            text = json.dumps(record | {"sha256": _digest(record)}, indent=1)
            write_file(folder / STATE, text.encode())
            if upload:
                upload(folder / STATE)
    except Exception as error:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise (save_problem(error, folder.parent) or error) from None


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every worker's value, by rank."""
    values = [value]
    if group:
        values *= dist.get_world_size(group)
        dist.all_gather_object(values, value, group=group)
    return values


def _cause(error: BaseException) -> BaseException:
    """The first worker's error in what torch raises for all of them."""
    if isinstance(error, CheckpointException):
        return next(failure for failure, _ in error.failures.values())
    return error


def read_checkpoint(folder: Path, tensors: Mapping[str, Tensor]) -> TrainState:
    """Reads a verified checkpoint into `tensors`, of which a worker may have only some rows; returns its state."""
    _load(dict(tensors), HuggingFaceStorageReader(str(folder)))
    return TrainState(**parse_state((folder / STATE).read_bytes(), folder / STATE)["state"])


class StoredModel(Mapping[str, Tensor]):
    """A verified checkpoint's parameters, tied ones once, or its adapters.

    Each is put together from its shards when it is asked for.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = _Reader(str(folder))
        try:
            stored: Any = self._reader.read_metadata().state_dict_metadata
        except Exception as error:  # safetensors' own, and whatever a header brings about that means something else
            raise DamagedCheckpoint(f"{folder} cannot be read: {one_line(error)}") from None
        self._stored = {name: kept for name, kept in stored.items() if not name[0].isdigit()}  # the optimizers'

    def __getitem__(self, name: str) -> Tensor:
        kept = self._stored[name]
        tensor = torch.empty(kept.size, dtype=kept.properties.dtype)
        _load({name: tensor}, self._reader)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._stored  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _load(tensors: dict[str, Tensor], reader: HuggingFaceStorageReader) -> None:
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # not even an Exception
        raise DamagedCheckpoint(f"{reader.path} cannot be read: {one_line(_cause(error))}") from None


class _Reader(HuggingFaceStorageReader):
    """Reads the headers of the shards once."""

    def read_metadata(self) -> Any:
        self._metadata = getattr(self, "_metadata", None) or super().read_metadata()
        return self._metadata


def save_problem(error: BaseException, place: object) -> TrainingError | None:
    """The error to show if `place` could not store a checkpoint; None for any other error."""
    problem = storage_problem(error, place)
    if isinstance(problem, StorageFull):
        return StorageFull(
            f"the disk is full: no space for a checkpoint in {place}; the last one is intact. Free some space there"
        )
    return problem and TrainingError(f"{problem}; the last checkpoint is intact")


def check_checkpoint(folder: Path, identity: Identity) -> None:
    """Verifies a checkpoint. Raises DamagedCheckpoint, or CheckpointError if it belongs to another run."""
    for what, theirs in verified(folder)["identity"].items():
        ours = getattr(identity, what)
        if theirs != ours:
            raise CheckpointError(
                f"the checkpoint in {folder} is from a run with another {what} "
                f"(fingerprint {theirs[:12]}, expected {ours[:12]}); "
                "resume it with the settings it was made with"
            )


def parse_state(text: bytes, where: object) -> dict[str, Any]:
    """Parses a state.json. Raises DamagedCheckpoint, or CheckpointError for another format version."""
    try:
        record: dict[str, Any] = json.loads(text)
        expected, format_version = record.pop("sha256", None), record["format"]
        if expected != _digest(record) and not (expected is None and format_version == 1):  # early ones had none
            raise ValueError("it was changed")
        if format_version in READABLE:
            Identity(**record["identity"]), TrainState(**record["state"]), dict(record["files"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where} is damaged ({error})") from None
    if format_version not in READABLE:
        raise CheckpointError(f"{where} has checkpoint format {format_version}; this version reads up to {FORMAT}")
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
