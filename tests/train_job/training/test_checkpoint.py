"""A checkpoint is intact or refused."""

import errno
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptcore.errors import CheckpointError, DamagedCheckpoint, TrainingError
from gptcore.files import sha256
from train_job.training import checkpoint
from train_job.training.checkpoint import (
    Identity,
    StoredModel,
    TrainState,
    check_checkpoint,
    read_checkpoint,
    save_checkpoint,
)

SHARD = "shard-00001-model-00001-of-00001.safetensors"
IDENTITY = Identity(model="m" * 64, tokenizer="t" * 64, data="d" * 64)
STATE = TrainState(step=7, elapsed=1.5, best_loss=2.25, best_step=5, since_best=1)


TENSORS = {"w": torch.arange(6.0).view(3, 2), "b": torch.ones(3), "0.0.step": torch.tensor(7.0), "0.1.m": torch.ones(2)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "c", STATE, IDENTITY, TENSORS)
    return tmp_path / "c"


def test_a_checkpoint_read_back_equals_the_saved_one(folder: Path) -> None:
    check_checkpoint(folder, IDENTITY)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    assert read_checkpoint(folder, tensors) == STATE
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    model = StoredModel(folder)
    assert model.keys() == {"w", "b"}, "without the optimizers' state"
    assert all(torch.equal(model[name], TENSORS[name]) for name in model)


def test_nothing_in_a_checkpoint_is_pickled(folder: Path) -> None:
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".safetensors"]


@pytest.mark.parametrize("name", [SHARD, "state.json"])
@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_a_damaged_file_is_named(folder: Path, name: str, damage: str) -> None:
    file = folder / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-9] if damage == "cut" else content[:-2] + b"\x07" + content[-1:])
    with pytest.raises(CheckpointError, match=name):
        check_checkpoint(folder, IDENTITY)


def test_a_checkpoint_of_the_earlier_format_is_read(folder: Path) -> None:
    """Format 1 had all tensors of the model in one file, and those of the optimizers in another."""
    model = {name: tensor for name, tensor in TENSORS.items() if not name[0].isdigit()}
    save_file(model, folder / "model.safetensors")
    save_file({name: tensor for name, tensor in TENSORS.items() if name not in model}, folder / "optimizer.safetensors")
    (folder / SHARD).unlink()
    record = json.loads((folder / "state.json").read_text())
    del record["sha256"]
    files = {file.name: sha256(file) for file in folder.glob("*.safetensors")}
    (folder / "state.json").write_text(json.dumps(record | {"format": 1, "files": files}))
    test_a_checkpoint_read_back_equals_the_saved_one(folder)


@pytest.mark.parametrize("what", ["model", "tokenizer", "data"])
def test_a_checkpoint_of_another_run_is_refused(folder: Path, what: str) -> None:
    other = Identity(**{**IDENTITY.__dict__, what: "x" * 64})
    with pytest.raises(CheckpointError, match=f"with another {what}"):
        check_checkpoint(folder, other)


def test_an_unknown_format_is_refused(folder: Path) -> None:
    record = json.loads((folder / "state.json").read_text()) | {"format": 99}
    del record["sha256"]
    record["sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (folder / "state.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="format 99"):
        check_checkpoint(folder, IDENTITY)


@pytest.mark.parametrize("change", [('"format": 2', '"format": 3'), ('"sha256"', '"sha257"')])
def test_a_changed_state_is_damaged_whatever_it_then_says(folder: Path, change: tuple[str, str]) -> None:
    state = folder / "state.json"
    state.write_text(change[1].join(state.read_text().rsplit(change[0], 1)))
    with pytest.raises(DamagedCheckpoint, match=r"state\.json is damaged \(it was changed\)"):
        check_checkpoint(folder, IDENTITY)


def test_a_shard_that_is_no_safetensors_is_damaged_even_with_the_right_hash(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (folder / SHARD).with_name("shard-00002-model-00002-of-00002.safetensors").write_bytes(b"?")
    with pytest.raises(DamagedCheckpoint, match="cannot be read"):
        StoredModel(folder)


def test_what_must_be_on_the_disk_before_a_checkpoint_is_synced_before_it_is_one(tmp_path: Path) -> None:
    complete: list[bool] = []
    save_checkpoint(
        tmp_path / "c", STATE, IDENTITY, TENSORS, sync=lambda: complete.append((tmp_path / "c" / "state.json").exists())
    )
    assert complete == [False]
    check_checkpoint(tmp_path / "c", IDENTITY)


def test_a_checkpoint_is_removed_if_what_belongs_to_it_cannot_be_synced(tmp_path: Path) -> None:
    def full() -> None:
        raise TrainingError("the disk is full")

    with pytest.raises(TrainingError, match="the disk is full"):
        save_checkpoint(tmp_path / "c", STATE, IDENTITY, TENSORS, sync=full)
    assert not (tmp_path / "c").exists()


def test_a_full_disk_leaves_the_earlier_checkpoint_intact(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "sha256", full)
    with pytest.raises(TrainingError, match="disk is full"):
        save_checkpoint(folder.with_name("d"), TrainState(step=8), IDENTITY, {"w": torch.zeros(3)})
    monkeypatch.undo()
    check_checkpoint(folder, IDENTITY)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_optimizer_state_of_other_parameters_is_refused(trainer: Callable, tmp_path: Path) -> None:
    one, other = trainer(), trainer(num_layers=1)
    assert one.identity("t").model != other.identity("t").model
    assert one.identity("t").data == other.identity("t").data
