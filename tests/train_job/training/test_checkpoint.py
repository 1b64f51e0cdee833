"""A checkpoint is intact or refused."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptcore.errors import CheckpointError, TrainingError
from train_job.training import checkpoint
from train_job.training.checkpoint import Identity, TrainState, load_checkpoint, load_model, save_checkpoint

IDENTITY = Identity(model="m" * 64, tokenizer="t" * 64, data="d" * 64)
STATE = TrainState(step=7, elapsed=1.5, best_loss=2.25, best_step=5, since_best=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "c", STATE, IDENTITY, {"w": torch.ones(3)}, {"0.0.exp_avg": torch.arange(4)})
    return tmp_path / "c"


def test_a_loaded_checkpoint_equals_the_saved_one(folder: Path) -> None:
    loaded = load_checkpoint(folder, IDENTITY)
    assert loaded.state == STATE
    assert torch.equal(loaded.model["w"], torch.ones(3))
    assert torch.equal(loaded.optimizer["0.0.exp_avg"], torch.arange(4))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_a_damaged_file_is_named(folder: Path, name: str, damage: str) -> None:
    file = folder / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-9] if damage == "cut" else content[:-2] + b"\x07" + content[-1:])
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(folder, IDENTITY)
    with pytest.raises(CheckpointError, match=name):
        load_model(folder)


@pytest.mark.parametrize("what", ["model", "tokenizer", "data"])
def test_a_checkpoint_of_another_run_is_refused(folder: Path, what: str) -> None:
    other = Identity(**{**IDENTITY.__dict__, what: "x" * 64})
    with pytest.raises(CheckpointError, match=f"with another {what}"):
        load_checkpoint(folder, other)


def test_an_unknown_format_is_refused(folder: Path) -> None:
    record = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(folder, IDENTITY)


def test_a_full_disk_leaves_the_earlier_checkpoint_intact(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TrainingError, match="disk is full"):
        save_checkpoint(folder, TrainState(step=8), IDENTITY, {"w": torch.zeros(3)}, {})
    assert load_checkpoint(folder, IDENTITY).state == STATE
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_optimizer_state_of_other_parameters_is_refused(trainer: Callable, tmp_path: Path) -> None:
    one, other = trainer(), trainer(num_layers=1)
    assert one.identity("t").model != other.identity("t").model
    assert one.identity("t").data == other.identity("t").data
