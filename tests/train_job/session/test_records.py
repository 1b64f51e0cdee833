"""Damaged files in a run's folder are refused by name, or repaired if nothing is lost."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gptcore.errors import ConfigError, FoundryError, RecordError, StorageFull, TrainingError
from tests.refusals import one_error
from tests.train_job.session.test_lock import begin_run
from tests.train_job.sweeps.test_sweep_input import GOOD
from train_job import run, sweep
from train_job.config import build_config
from train_job.files import storage_problem, written_whole
from train_job.session.begin import begin
from train_job.session.console import Console
from train_job.session.exit_code import exit_code
from train_job.session.finish import ended_with, failure_code
from train_job.session.history import History, read_history
from train_job.sweeps.trials import ENDING, Ending, Trial
from train_job.tracking.spool import Spool, _Progress, deliver, undelivered

RECORD = {"run_id": "a" * 32, "tracking_uri": "sqlite:///x.db", "text": {"notes.txt": [["s3://b/notes.txt", "1"]]}}
DAMAGED = {
    "empty": b"",
    "a line of nothing": b"\n",
    "cut": json.dumps(RECORD).encode()[:-30],
    "garbage": b"\x00\xff\xfe\x9c" * 20,
    "a list": b"[]",
    "null": b"null",
    "too deep": b"[" * 100_000,
    "no run_id": json.dumps({"tracking_uri": "sqlite:///x.db"}).encode(),
    "no tracking_uri": json.dumps({"run_id": "a"}).encode(),
    "a number": json.dumps(RECORD | {"run_id": 7}).encode(),
    "texts that are none": json.dumps(RECORD | {"text": {"notes.txt": 3}}).encode(),
    "text that is a list": json.dumps(RECORD | {"text": [1]}).encode(),
}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was begun here."""
    monkeypatch.setenv("GPT_FOUNDRY_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(run, "ray_cluster", None)
    return begin_run(tmp_path / "runs" / "mine")


@pytest.fixture
def refused(mine: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Resumes the run, which must be refused and left unchanged. Returns the one line."""

    def call(main: Callable[[list[str]], int] = run.main) -> str:
        before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file() and path.name != ".lock"}
        assert main(["--resume=mine"]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert {path: path.read_bytes() for path in before} == before
        return one_error(said.err)

    return call


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_run_json_is_one_line(mine: Path, refused: Callable[..., str], damage: str) -> None:
    (mine / "run.json").write_bytes(DAMAGED[damage])
    said = refused()
    assert str(mine / "run.json") in said
    assert "Put a copy back" in said


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\x00\xff" * 9,
        b"data: [",
        b"- 1\n",
        b"data: 2026-99-99\n",
        b"preset: quick\n",
        "half",
        "without batch_size",
        "with a word for a number",
        "missing",
    ],
)
def test_a_damaged_config_yaml_is_one_line(mine: Path, refused: Callable[..., str], damage: bytes | str) -> None:
    (mine / "run.json").write_text(json.dumps(RECORD))
    path = mine / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    [at] = [number for number, line in enumerate(lines) if line.startswith("batch_size:")]
    if damage == "missing":
        path.unlink()
    elif damage == "half":
        path.write_text("".join(lines[: len(lines) // 2]))
    elif damage == "without batch_size":
        path.write_text("".join(lines[:at] + lines[at + 1 :]))
    elif damage == "with a word for a number":
        path.write_text("".join([*lines[:at], "batch_size: many\n", *lines[at + 1 :]]))
    else:
        assert isinstance(damage, bytes)
        path.write_bytes(damage)
    said = refused()
    assert "batch_size" in said if "batch_size" in str(damage) or "word" in str(damage) else str(path) in said


def test_a_run_of_an_earlier_version_without_newer_settings_is_resumed(mine: Path) -> None:
    lines = (mine / "config.yaml").read_text().splitlines(keepends=True)
    (mine / "config.yaml").write_text("".join(line for line in lines if not line.startswith("document_separator:")))
    with begin({"resume": "mine"}) as (config, _):
        assert config.document_separator is None


def test_a_complete_config_is_resumed_unchanged(mine: Path) -> None:
    with begin({"resume": "mine"}) as (config, folder):
        assert folder == mine
        assert config.flat() == build_config({"name": "mine", "storage_path": str(mine.parent)}).flat() | {
            "cache_dir": config.cache_dir
        }


def test_a_new_run_does_not_reuse_a_folder_without_a_config(mine: Path) -> None:
    for left in ("run.json", "checkpoint_1"):
        folder = mine.parent / f"of-{left}"
        (folder / left).mkdir(parents=True)
        with pytest.raises(ConfigError, match="there is a run"), begin({"name": folder.name}):
            pass


@pytest.mark.parametrize(
    "text", ["", "trials: 2\n", GOOD, f"base: {{}}\n{GOOD}", f"base: 3\n{GOOD}", "\x00", "base: ["]
)
def test_a_damaged_plan_of_a_sweep_is_one_line(mine: Path, refused: Callable[..., str], text: str) -> None:
    (mine / "sweep.yaml").write_text(text)
    assert str(mine / "sweep.yaml") in refused(sweep.main)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"status": "FINISHED"}', '{"status": "FAILED", "why": "", "steps": "x", "seconds": 1}']
)
def test_a_damaged_result_of_a_trial_is_named(mine: Path, content: str) -> None:
    trial = Trial(1, {}, build_config({"name": "mine"}), mine)
    (mine / ENDING).write_text(content)
    with pytest.raises(RecordError, match=rf"{ENDING}.*remove it"):
        trial.ending()
    trial.end(Ending("FINISHED", "ASHA", 3, 1.0))
    assert trial.ending() == Ending("FINISHED", "ASHA", 3, 1.0)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "same config"])
def test_a_damaged_outcome_is_rebuilt_and_reported(
    mine: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    config = build_config({"name": "mine"})
    assert ended_with(mine, config) is None
    assert capsys.readouterr().out == ""
    (mine / "outcome.json").write_text(json.dumps({"config": config.flat()}) if content == "same config" else content)
    assert ended_with(mine, config) is None
    assert ("outcome.json" in capsys.readouterr().out) == (content != "{}"), "{} is of another config"


def test_damaged_lines_of_the_history_are_removed_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    good = [{"step": step, "tokens": step, "epoch": 1.0, "train_loss": 2.0} for step in (1, 2, 3)]
    one, two, three = (json.dumps(row).encode() + b"\n" for row in good)
    path.write_bytes(one + b"\x00\xff\n" + two + b"[]\n" + b'{"step": "x"}\n' + three + b'{"step": 4, "tok')
    assert read_history(path) == good
    history = History(path)
    assert (history.rows, history.damaged) == (good, 3)
    assert path.read_bytes() == one + two + three
    assert History(path).damaged == 0


def test_the_intact_lines_of_a_damaged_spool_are_delivered(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("spool")).info.run_id
    folder = tmp_path / "spool"
    point = {"time": 1, "values": {"loss": 1.0}}
    lines = [json.dumps({"step": step, **point}) for step in (1, 2, 3)]
    folder.mkdir()
    (folder / "lines.jsonl").write_text("\n".join([lines[0], "{}", "\x00", lines[1], '["x"]', lines[2]]) + "\n")
    for content in ("", "[]", "{}x", '{"offset": "1"}'):
        (folder / "delivered.json").write_text(content)
        assert _Progress.read(folder) is None
    (folder / "spool.json").write_text("")
    with pytest.raises(RecordError, match=r"spool\.json is empty"):
        deliver(folder)
    spool = Spool(folder, run_id, uri)
    spool.metrics(4, {"loss": 1.0})
    assert spool.close(60) == 0
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == [1, 2, 3, 4]
    assert undelivered(folder) == 0


# --- Storage that takes no more ---------------------------------------------------------------------------------


def raises(error: BaseException) -> Callable[[], int]:
    def job() -> int:
        raise error

    return job


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 1, "the disk that holds /data/x is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/data/x"), 1, "the disk that holds /data/x is full"),
        (StorageFull("the disk that holds /data is full"), 1, "the disk that holds /data is full"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/x"),
            2,
            "cannot write to /data/x: Permission denied",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 2, "cannot write to /x: Read-only file system"),
        (ConfigError("batch_size is 0"), 2, "batch_size is 0"),
    ],
)
def test_a_full_disk_is_not_reported_as_wrong_input(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    assert exit_code(raises(error)) == code
    assert one_error(capsys.readouterr().err).startswith(f"error: {said}")


def test_other_system_errors_are_not_hidden() -> None:
    with pytest.raises(FileNotFoundError):
        exit_code(raises(FileNotFoundError(errno.ENOENT, "No such file or directory", "/x")))


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError("[errno 28] No space left on device"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("I/O error: Disk quota exceeded (os error 122)"), True),
        (RuntimeError("Permission denied (os error 13)"), False),
        (RuntimeError("something else"), None),
    ],
)
def test_a_full_disk_is_recognised_in_the_errors_of_every_library(error: Exception, full: bool | None) -> None:
    problem = storage_problem(error, "/data")
    assert (problem and isinstance(problem, StorageFull)) == full


def test_a_full_device_raises_the_error_to_show_while_writing_the_history(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    history.path.symlink_to("/dev/full")
    with pytest.raises(StorageFull, match=str(tmp_path)):
        history._keep("train_loss", {"step": 1, "train_loss": 1.0})
    with pytest.raises(TrainingError, match="cannot write"), written_whole(Path("/proc/nothing/x")) as file:
        file.write(b"x")


def test_a_full_log_does_not_fail_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(tmp_path)
    console._log.close()
    console._log = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    for text in ("one", "two"):
        console.say(text)
    console.close()
    said = capsys.readouterr().out
    assert [said.count(text) for text in ("one\n", "two\n", "gets no more lines: No space left on device")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("problem", "began", "code"),
    [
        (ConfigError("x"), False, 2),
        (RecordError("x"), True, 1),
        (TrainingError("x"), False, 1),
        (StorageFull("x"), True, 1),
    ],
)
def test_errors_after_training_has_started_are_not_reported_as_wrong_input(
    problem: FoundryError, began: bool, code: int
) -> None:
    assert failure_code(problem, began) == code
