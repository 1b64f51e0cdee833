"""A run resumes from the newest intact checkpoint and ends with the best one; unneeded ones are removed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptcore.errors import CheckpointError, DamagedCheckpoint
from train_job.config import TrainConfig, build_config
from train_job.training.checkpoint import Identity, StoredModel, TrainState, check_checkpoint, save_checkpoint
from train_job.training.storage import (
    RAYS_RECORD,
    StoredCheckpoint,
    checkpoints,
    drop,
    drop_all_but,
    first_whole,
    forget_rays_record,
    newest,
    superseded,
)

SHARD = "shard-00001-model-00001-of-00001.safetensors"
IDENTITY = Identity(model="m" * 64, tokenizer="t" * 64, data="d" * 64)


@pytest.fixture(params=["folder", "url", "fsspec"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> TrainConfig:
    """The checkpoints of a run, in a folder or at a URL."""
    storage = {"folder": str(tmp_path), "url": tmp_path.as_uri(), "fsspec": f"fsspec+{tmp_path.as_uri()}"}
    return build_config({"name": "one", "storage_path": storage[request.param]})


def save(folder: Path, step: int, loss: float | None) -> Path:
    """A checkpoint of this step. Without a loss, it was not evaluated."""
    state = TrainState(step=step, last_evaluated=step if loss else 0, last_loss=loss or float("inf"))
    path = folder / "one" / f"checkpoint_2026-01-01_{step:06}"
    save_checkpoint(path, state, IDENTITY, {"w": torch.full((3,), float(step)), "0.0.m": torch.ones(2)})
    return path


@pytest.fixture
def saved(tmp_path: Path) -> list[Path]:
    """Four checkpoints, of steps 20 to 80. The second is the best, and the last was not evaluated."""
    return [save(tmp_path, step, loss) for step, loss in ((20, 3.0), (40, 2.0), (60, 2.5), (80, None))]


def gone_on_from(config: TrainConfig) -> tuple[int, float, list[str]]:
    """(step of the checkpoint that a run resumes from, its weight, the warnings about skipped ones)."""
    said: list[str] = []

    def load(folder: Path) -> float:
        check_checkpoint(folder, IDENTITY)
        return float(StoredModel(folder)["w"][0])

    choice = first_whole(checkpoints(config), load, said.append)
    assert choice
    kept, weight = choice
    return kept.step, weight, said


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [SHARD, "state.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_run_resumes_from_the_newest_intact_checkpoint_and_reports_the_skipped_ones(
    config: TrainConfig, saved: list[Path], name: str, damage: Callable[[Path], None]
) -> None:
    assert gone_on_from(config) == (80, 80.0, [])
    damage(saved[-1] / name)
    step, weight, said = gone_on_from(config)
    assert (step, weight) == (60, 60.0)
    [line] = said
    assert line.startswith("skipped a checkpoint: ")
    assert str(saved[-1] / name) in line


def test_an_altered_step_in_state_json_is_detected(config: TrainConfig, saved: list[Path]) -> None:
    state = saved[-1] / "state.json"
    state.write_text(state.read_text().replace('"step": 80', '"step": 90'))
    step, _, [line] = gone_on_from(config)
    assert step == 60
    assert "it was changed" in line


def test_missing_empty_and_incomplete_folders_are_skipped(config: TrainConfig, saved: list[Path]) -> None:
    shutil.rmtree(saved[-1])
    assert gone_on_from(config)[0] == 60
    (saved[0].parent / "checkpoint_2027-01-01").mkdir()
    (saved[2] / SHARD).unlink()
    step, _, said = gone_on_from(config)
    assert step == 40
    assert len(said) == 2


def test_without_an_intact_checkpoint_the_newest_ones_damage_is_named(config: TrainConfig, saved: list[Path]) -> None:
    for path in saved:
        cut(path / SHARD)
    with pytest.raises(
        DamagedCheckpoint, match=r"all checkpoints of this run are damaged: .*000080/shard-00001-.*\.safetensors"
    ):
        gone_on_from(config)


def test_if_only_unfinished_checkpoints_are_left_the_run_starts_from_the_beginning(
    config: TrainConfig, saved: list[Path]
) -> None:
    for path in saved:
        (path / "state.json").unlink()
    said: list[str] = []
    assert first_whole(checkpoints(config), lambda folder: 1, said.append) is None
    assert len(said) == len(saved)


def test_a_checkpoint_is_read_while_it_is_here(config: TrainConfig, saved: list[Path]) -> None:
    """At a URL it is a copy, which is gone afterwards."""
    choice = first_whole(checkpoints(config), lambda folder: float(StoredModel(folder)["w"][0]))
    assert choice
    assert choice[1] == 80.0


def test_a_run_without_checkpoints_starts_from_the_beginning(config: TrainConfig) -> None:
    assert first_whole(checkpoints(config), lambda folder: 1) is None


def test_a_checkpoint_of_another_run_is_not_reported_as_damaged(config: TrainConfig, saved: list[Path]) -> None:
    other = Identity(model="x" * 64, tokenizer="t" * 64, data="d" * 64)
    with pytest.raises(CheckpointError, match="with another model") as caught:
        first_whole(checkpoints(config), lambda folder: check_checkpoint(folder, other))
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_an_older_checkpoint_without_a_checksum_is_read(config: TrainConfig, saved: list[Path]) -> None:
    state = saved[-1] / "state.json"
    record = json.loads(state.read_text())
    del record["sha256"], record["state"]["last_loss"]
    state.write_text(json.dumps(record | {"format": 1}))  # format 2 always had one
    assert gone_on_from(config)[0] == 80


def test_only_checkpoints_that_are_not_used_previous_best_or_newer_are_superseded(
    config: TrainConfig, saved: list[Path]
) -> None:
    found = checkpoints(config)
    by_step: dict[int, StoredCheckpoint] = {kept.step: kept for kept in found}
    assert [kept.step for kept in superseded(found, by_step[80])] == [20]
    assert [kept.step for kept in superseded(found, by_step[60])] == [20]
    assert [kept.step for kept in superseded(found, by_step[40])] == []


def test_the_last_checkpoint_of_a_repeated_step_is_the_newest(
    config: TrainConfig, saved: list[Path], tmp_path: Path
) -> None:
    again = saved[-1].with_name("checkpoint_2026-01-02")
    saved[-1].rename(again)
    save(tmp_path, 80, None)
    (tmp_path / "one" / "checkpoint_of_a_killed_worker").mkdir()
    assert [kept.name for kept in newest(checkpoints(config), 2)] == [again.name, saved[2].name]


def test_at_the_end_the_chosen_and_the_two_newest_intact_checkpoints_stay(
    config: TrainConfig, saved: list[Path], tmp_path: Path
) -> None:
    flip(saved[2] / SHARD)
    save(tmp_path, 10, 1.0)
    found = checkpoints(config)
    drop_all_but(found[-1], found, config, print)
    assert [kept.step for kept in checkpoints(config)] == [80, 40, 10], "60 is damaged, and 20 nobody needs"


def test_unneeded_checkpoints_are_removed_and_everything_else_stays(
    config: TrainConfig, saved: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "one" / "checkpoint_of_a_killed_worker").mkdir()
    (tmp_path / "one" / "package").mkdir()
    (tmp_path / "two" / "checkpoint_1").mkdir(parents=True)
    (tmp_path / "one" / RAYS_RECORD).touch()
    drop(config, {saved[1].name, saved[3].name})
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(
        [saved[1].name, saved[3].name, "package", RAYS_RECORD]
    )
    drop(config)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [RAYS_RECORD, "package"]
    assert (tmp_path / "two" / "checkpoint_1").exists()
    drop(build_config({"name": "none", "storage_path": config.storage_path}))


@pytest.mark.parametrize("content", [None, b"", b"{not json", b'{"checkpoint_results": []}', "a folder"])
def test_rays_own_record_is_deleted_whatever_it_contains(
    config: TrainConfig, tmp_path: Path, content: bytes | str | None
) -> None:
    (tmp_path / "one").mkdir()
    path = tmp_path / "one" / RAYS_RECORD
    if content == "a folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    forget_rays_record(config)
    assert not path.exists()
