"""Where a run's checkpoints are kept: a folder, or a URL that pyarrow or fsspec opens.

In: a run's config. Out: its checkpoints, the newest or best of them that is whole, and a folder without those that
nothing needs any more; beside them, what another machine needs to go on with the run. Ray Train writes checkpoints and
keeps a record of them, in place. A record can be damaged, or lack a checkpoint that was just written as the worker
died; so we go by the folders, each of which can be verified.
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
from train_job.files import written_whole
from train_job.training.checkpoint import FILES, STATE, TrainState, parse_state, verified

RECORD = ("run.json", "config.yaml")
"""The files of a run's folder that another machine needs to go on with it; the one that counts is last."""
RAYS_RECORD = "checkpoint_manager_snapshot.json"

Loaded = TypeVar("Loaded")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Kept:
    """A checkpoint in a run's storage. `state` is None where state.json cannot be read; `why` says what is wrong."""

    fs: Any
    path: str
    state: TrainState | None
    why: str = ""

    @property
    def name(self) -> str:
        """The folder's, which has the time at which it was made."""
        return self.path.rpartition("/")[2]

    @property
    def step(self) -> int:
        """The steps that were done; more than any run does, if that cannot be read."""
        return self.state.step if self.state else 2**62

    @property
    def loss(self) -> float:
        """The validation loss, in nats per token; infinite if there is none."""
        return self.state.loss if self.state else math.inf

    @contextlib.contextmanager
    def files(self) -> Iterator[Path]:
        """Its folder on this machine, or a copy that is there for as long as the block lasts."""
        from pyarrow.fs import LocalFileSystem

        if isinstance(self.fs, LocalFileSystem):
            yield Path(self.path)
            return
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
            for name in FILES:
                with (
                    contextlib.suppress(FileNotFoundError),  # whoever verifies it says so
                    self.fs.open_input_stream(f"{self.path}/{name}") as source,
                    open(Path(scratch) / name, "wb") as copy,
                ):
                    shutil.copyfileobj(source, copy, 2**24)
            yield Path(scratch)


def run_storage(config: TrainConfig) -> tuple[Any, str]:
    """The file system with the run's checkpoints, and their folder there."""
    from pyarrow.fs import FileSystem

    storage = str(config.storage_path)
    fs, path = FileSystem.from_uri(storage if "://" in storage else Path(storage).as_uri())
    return fs, f"{path}/{config.name}"


def checkpoints(config: TrainConfig) -> list[Kept]:
    """Those there are, by what their state.json says: the one of the most steps first, unreadable ones before all."""
    from pyarrow.fs import FileSelector

    fs, folder = run_storage(config)
    found = []
    for info in fs.get_file_info(FileSelector(folder, allow_not_found=True)):
        if info.base_name.startswith("checkpoint_") and not info.is_file:
            found.append(_kept(fs, info.path))
    return sorted(found, key=lambda kept: (kept.step, kept.name), reverse=True)


def _kept(fs: Any, path: str) -> Kept:
    where = f"{path}/{STATE}"
    try:
        with fs.open_input_stream(where) as file:
            return Kept(fs, path, TrainState(**parse_state(file.read(), where)["state"]))
    except FileNotFoundError:
        return Kept(fs, path, None, f"{where} is missing")
    except OSError as error:  # it is a folder, or a link that leads nowhere
        return Kept(fs, path, None, f"{where} cannot be read: {' '.join(str(error).split())}")
    except DamagedCheckpoint as error:
        return Kept(fs, path, None, str(error))


def first_whole(
    found: Iterable[Kept], load: Callable[[Path], Loaded], say: Say = lambda text: None
) -> tuple[Kept, Loaded] | None:
    """The first that `load` finds whole, and what it loads; None if there are none. Says which are not, and why.

    Raises DamagedCheckpoint if none of those there are is whole.
    """
    first = ""
    for kept in found:
        problem = kept.why
        if not problem:
            with kept.files() as folder:
                try:
                    return kept, load(folder)
                except DamagedCheckpoint as error:
                    problem = str(error).replace(str(folder), kept.path)
        first = first or problem
        say(f"stepped over a checkpoint: {problem}")
    if first:
        raise DamagedCheckpoint(f"no checkpoint of this run is whole: {first}. Put a copy back, or begin a new run")
    return None


def drop(config: TrainConfig, keep: Collection[str] = (), say: Say = lambda text: None) -> None:
    """Removes the checkpoints that the run has left in its storage, but for these; says what could not be removed."""
    with _unless_away(config, say):
        for kept in checkpoints(config):
            if kept.name not in keep:
                kept.fs.delete_dir(kept.path)


def drop_all_but(chosen: Kept, found: Iterable[Kept], config: TrainConfig, say: Say) -> None:
    """Removes what a run that has ended does not need: all but the one that was chosen, and the newest two.

    With these it can go on, even from the one before should the newest be damaged.
    """
    with _unless_away(config, say):
        keep = {chosen.name, *(kept.name for kept in newest(found, 2, known={chosen.name}))}
        drop(config, keep, say)


@contextlib.contextmanager
def _unless_away(config: TrainConfig, say: Say) -> Iterator[None]:
    """Within it, storage that is away, or that lets nothing be deleted, costs a line and no run."""
    try:
        yield
    except OSError as error:
        say(f"warning: checkpoints of {config.name} that are not needed stay: {' '.join(str(error).split())}")


def newest(found: Iterable[Kept], count: int, known: Collection[str] = ()) -> list[Kept]:
    """So many of checkpoints (newest first) that are whole and differ in their step; those `known` to be are not read.

    Of a step that was repeated, it is the last.
    """
    whole: dict[int, Kept] = {}
    for kept in found:
        if len(whole) == count:
            break
        if kept.state and kept.step not in whole:
            with contextlib.suppress(DamagedCheckpoint):
                if kept.name not in known:
                    with kept.files() as folder:
                        verified(folder)
                whole[kept.step] = kept
    return list(whole.values())


def superseded(found: Iterable[Kept], used: Kept) -> list[Kept]:
    """Of checkpoints (newest first) from which a run could have gone on, those that neither it nor its end needs.

    These are needed: the one that is `used`, the one before, the best, and those that could not be read or are newer.
    The last two are for whoever looks after the damage, until the run has ended.
    """
    older = [kept for kept in found if kept.step <= used.step]
    best = min(older, key=lambda kept: kept.loss, default=used)
    before = next((kept for kept in older if kept.step < used.step), used)
    return [kept for kept in older if kept.path not in (used.path, before.path, best.path)]


def forget_rays_record(config: TrainConfig) -> None:
    """Has Ray Train begin with an empty list of checkpoints, whatever was left of its last one."""
    from pyarrow.fs import FileType

    fs, folder = run_storage(config)
    path = f"{folder}/{RAYS_RECORD}"
    kind = fs.get_file_info(path).type
    if kind == FileType.Directory:
        fs.delete_dir(path)
    elif kind != FileType.NotFound:
        fs.delete_file(path)


def check_storage(url: str) -> None:
    """Raises ConfigError if Ray cannot keep a run's checkpoints under this URL."""
    from pyarrow.fs import FileSystem

    try:
        fs, path = FileSystem.from_uri(url)
        fs.create_dir(path)  # asks the store; Ray would later, after the run was opened
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"storage_path is {url!r}: {error}. Expected a folder or a URL such as file:///FOLDER, s3://BUCKET/FOLDER "
            "or gs://BUCKET/FOLDER; any other that fsspec knows is written fsspec+SCHEME://FOLDER"
        ) from None
    except OSError as error:
        raise ConfigError(f"storage_path {url!r} cannot be reached: {' '.join(str(error).split())}") from None


def fetch_record(url: str, run_dir: Path) -> None:
    """Copies into `run_dir` what a machine has kept of this run under the storage URL, unless it is here already."""
    from pyarrow.fs import FileSystem, FileType

    try:
        fs, path = FileSystem.from_uri(url)
        for name in RECORD:
            kept = f"{path}/{run_dir.name}/{name}"
            if not (run_dir / name).exists() and fs.get_file_info(kept).type == FileType.File:
                with fs.open_input_stream(kept) as source, written_whole(run_dir / name) as copy:
                    copy.write(source.read())
    except OSError as error:
        raise ConfigError(f"storage_path {url!r} cannot be read: {' '.join(str(error).split())}") from None


def keep_record(url: str, run_dir: Path) -> None:
    """Puts beside the run's checkpoints what another machine needs to go on with it."""
    from pyarrow.fs import FileSystem

    try:
        fs, path = FileSystem.from_uri(url)
        fs.create_dir(f"{path}/{run_dir.name}")
        for name in RECORD:
            with fs.open_output_stream(f"{path}/{run_dir.name}/{name}") as copy:
                copy.write((run_dir / name).read_bytes())
    except OSError as error:
        raise ConfigError(f"storage_path {url!r} cannot be written: {' '.join(str(error).split())}") from None
