"""The storage of a run's checkpoints: a folder, or a URL that pyarrow or fsspec opens.

In: a run's config. Out: its checkpoints, and the newest or best one that is intact; checkpoints that are no longer
needed are removed. The storage also has the files that another machine needs to resume the run. There is no list of
checkpoints, which could be damaged or lack one: this module reads the folders, each of which can be verified.
"""

import contextlib
import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gptcore.errors import ConfigError, DamagedCheckpoint
from train_job.config import TrainConfig
from train_job.files import one_line, written_whole
from train_job.training.checkpoint import STATE, TrainState, parse_state, verified

RECORD = ("run.json", "config.yaml")
"""The files of a run's folder that another machine needs to resume it; config.yaml, which marks a run, is last."""
RAYS_RECORD = "checkpoint_manager_snapshot.json"
COPIED_BYTES = 2**24
"""Read and written at a time."""

Loaded = TypeVar("Loaded")
Say = Callable[[str], None]


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint in a run's storage. `state` is None if state.json cannot be read; `why` is the problem."""

    fs: Any
    path: str
    state: TrainState | None
    why: str = ""
    unfinished: bool = False
    """Whether it has no state.json: its writer was killed, or is still writing."""

    @property
    def name(self) -> str:
        """The folder's name, which has the time of creation."""
        return self.path.rpartition("/")[2]

    @property
    def step(self) -> int:
        """The steps done; if that cannot be read, more than any run takes."""
        return self.state.step if self.state else 2**62

    @property
    def loss(self) -> float:
        """The validation loss, in nats per token; infinite if there is none."""
        return self.state.loss if self.state else math.inf

    @contextlib.contextmanager
    def files(self) -> Iterator[Path]:
        """Its folder on this machine, or a temporary copy that exists within the block."""
        from pyarrow.fs import FileSelector

        if folder := local_folder(self.fs, self.path):
            yield folder
            return
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
            for info in self.fs.get_file_info(FileSelector(self.path)):
                with (
                    contextlib.suppress(FileNotFoundError),  # verification reports it
                    self.fs.open_input_stream(info.path) as source,
                    open(Path(scratch) / info.base_name, "wb") as copy,
                ):
                    shutil.copyfileobj(source, copy, COPIED_BYTES)
            yield Path(scratch)


def local_folder(fs: Any, path: str) -> Path | None:
    """The folder at `path`, if the file system is this machine's."""
    from pyarrow.fs import LocalFileSystem

    return Path(path) if isinstance(fs, LocalFileSystem) else None


def copy_file(file: Path, fs: Any, folder: str) -> None:
    """Copies a file of this machine into a folder of the storage."""
    fs.create_dir(folder)
    with file.open("rb") as source, fs.open_output_stream(f"{folder}/{file.name}") as copy:
        shutil.copyfileobj(source, copy, COPIED_BYTES)


def run_storage(config: TrainConfig) -> tuple[Any, str]:
    """The file system of the run's checkpoints, and their folder in it."""
    from pyarrow.fs import FileSystem

    storage = str(config.storage_path)
    fs, path = FileSystem.from_uri(storage if "://" in storage else Path(storage).as_uri())
    return fs, f"{path}/{config.name}"


def checkpoints(config: TrainConfig) -> list[StoredCheckpoint]:
    """The run's checkpoints, most steps first; those whose state.json cannot be read come before all others."""
    from pyarrow.fs import FileSelector

    fs, folder = run_storage(config)
    found = []
    for info in fs.get_file_info(FileSelector(folder, allow_not_found=True)):
        if info.base_name.startswith("checkpoint_") and not info.is_file:
            found.append(_read(fs, info.path))
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.name), reverse=True)


def _read(fs: Any, path: str) -> StoredCheckpoint:
    where = f"{path}/{STATE}"
    try:
        with fs.open_input_stream(where) as file:
            return StoredCheckpoint(fs, path, TrainState(**parse_state(file.read(), where)["state"]))
    except FileNotFoundError:
        return StoredCheckpoint(fs, path, None, f"{where} is missing", unfinished=True)
    except OSError as error:  # a folder, or a broken link
        return StoredCheckpoint(fs, path, None, f"{where} cannot be read: {one_line(error)}")
    except DamagedCheckpoint as error:
        return StoredCheckpoint(fs, path, None, str(error))


def first_whole(
    found: Iterable[StoredCheckpoint], load: Callable[[Path], Loaded], say: Say = lambda text: None
) -> tuple[StoredCheckpoint, Loaded] | None:
    """The first checkpoint that `load` can read, and what it returns; None if none was ever finished.

    `load` gets its folder, which may be a copy that is deleted afterwards. Each checkpoint that is skipped is reported
    through `say`. Raises DamagedCheckpoint if all are damaged.
    """
    first = ""
    for checkpoint in found:
        problem = checkpoint.why
        if not problem:
            with checkpoint.files() as folder:
                try:
                    return checkpoint, load(folder)
                except DamagedCheckpoint as error:
                    problem = str(error).replace(str(folder), checkpoint.path)
        if not checkpoint.unfinished:
            first = first or problem
        say(f"skipped a checkpoint: {problem}")
    if first:
        raise DamagedCheckpoint(
            f"all checkpoints of this run are damaged: {first}. Restore one from a copy, or start a new run"
        )
    return None


def drop(config: TrainConfig, keep: Collection[str] = (), say: Say = lambda text: None) -> None:
    """Removes the run's checkpoints except those in `keep`; reports what could not be removed."""
    with _unless_away(config, say):
        for checkpoint in checkpoints(config):
            if checkpoint.name not in keep:
                checkpoint.fs.delete_dir(checkpoint.path)


def drop_all_but(chosen: StoredCheckpoint, found: Iterable[StoredCheckpoint], config: TrainConfig, say: Say) -> None:
    """Removes a finished run's checkpoints except the chosen one and the newest two.

    The run can be resumed from these, even if the newest is damaged.
    """
    with _unless_away(config, say):
        keep = {chosen.name, *(checkpoint.name for checkpoint in newest(found, 2, known={chosen.name}))}
        drop(config, keep, say)


@contextlib.contextmanager
def _unless_away(config: TrainConfig, say: Say) -> Iterator[None]:
    """Turns an error of the storage within the block into a warning."""
    try:
        yield
    except OSError as error:
        say(f"warning: unneeded checkpoints of {config.name} could not be removed: {one_line(error)}")


def newest(found: Iterable[StoredCheckpoint], count: int, known: Collection[str] = ()) -> list[StoredCheckpoint]:
    """The first `count` intact checkpoints with different steps, of checkpoints sorted newest first.

    Those named in `known` are not verified again. Of a repeated step, the last one is taken.
    """
    whole: dict[int, StoredCheckpoint] = {}
    for checkpoint in found:
        if len(whole) == count:
            break
        if checkpoint.state and checkpoint.step not in whole:
            with contextlib.suppress(DamagedCheckpoint):
                if checkpoint.name not in known:
                    with checkpoint.files() as folder:
                        verified(folder)
                whole[checkpoint.step] = checkpoint
    return list(whole.values())


def superseded(found: Iterable[StoredCheckpoint], used: StoredCheckpoint) -> list[StoredCheckpoint]:
    """The checkpoints that a run resumed from `used` no longer needs; `found` is sorted newest first.

    Still needed are `used`, the one before it, the best, and those that are newer or could not be read. The last two
    remain until the run ends, so that the damage can be examined.
    """
    older = [checkpoint for checkpoint in found if checkpoint.step <= used.step]
    best = min(older, key=lambda checkpoint: checkpoint.loss, default=used)
    before = next((checkpoint for checkpoint in older if checkpoint.step < used.step), used)
    return [checkpoint for checkpoint in older if checkpoint.path not in (used.path, before.path, best.path)]


def forget_rays_record(config: TrainConfig) -> None:
    """Removes the list of checkpoints that Ray Train has of a run of version 0.1, and would read."""
    from pyarrow.fs import FileType

    fs, folder = run_storage(config)
    path = f"{folder}/{RAYS_RECORD}"
    kind = fs.get_file_info(path).type
    if kind == FileType.Directory:
        fs.delete_dir(path)
    elif kind != FileType.NotFound:
        fs.delete_file(path)


def check_storage(url: str) -> None:
    """Raises ConfigError if Ray cannot store checkpoints under this URL."""
    from pyarrow.fs import FileSystem

    try:
        fs, path = FileSystem.from_uri(url)
        fs.create_dir(path)  # contacts the store; Ray does so only after the run is opened
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"storage_path is {url!r}: {error}. Expected a folder or a URL such as file:///FOLDER, s3://BUCKET/FOLDER "
            "or gs://BUCKET/FOLDER; for any other scheme of fsspec, use fsspec+SCHEME://FOLDER"
        ) from None
    except OSError as error:
        raise ConfigError(f"storage_path {url!r} cannot be reached: {one_line(error)}") from None


def fetch_record(url: str, run_dir: Path) -> None:
    """Copies the run's record from the storage URL into `run_dir`, except files that exist there."""
    from pyarrow.fs import FileSystem, FileType

    try:
        fs, path = FileSystem.from_uri(url)
        for name in RECORD:
            stored = f"{path}/{run_dir.name}/{name}"
            if not (run_dir / name).exists() and fs.get_file_info(stored).type == FileType.File:
                with fs.open_input_stream(stored) as source, written_whole(run_dir / name) as copy:
                    copy.write(source.read())
    except OSError as error:
        raise ConfigError(f"storage_path {url!r} cannot be read: {one_line(error)}") from None


def keep_record(url: str, run_dir: Path) -> None:
    """Copies the run's record to the storage, so that another machine can resume it."""
    from pyarrow.fs import FileSystem

    try:
        fs, path = FileSystem.from_uri(url)
        fs.create_dir(f"{path}/{run_dir.name}")
        for name in RECORD:
            with fs.open_output_stream(f"{path}/{run_dir.name}/{name}") as copy:
                copy.write((run_dir / name).read_bytes())
    except OSError as error:
        raise ConfigError(f"storage_path {url!r} cannot be written: {one_line(error)}") from None
