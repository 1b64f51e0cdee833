"""From the settings of a command line to a run's config and its locked folder.

In: settings. Out: a new run under a free name, or an earlier run that is resumed. If the input turns out to be wrong,
no folder is left behind.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from gptcore.errors import ConfigError, did_you_mean
from gptcore.home import expanded, home
from train_job.config import TrainConfig, build_config, resume_config
from train_job.files import LONGEST_NAME
from train_job.session.lock import Taken, claimed, locked
from train_job.session.record import CONFIG, RUN, saved_settings
from train_job.training.storage import check_storage, fetch_record


@contextlib.contextmanager
def begin(given: dict[str, Any]) -> Iterator[tuple[TrainConfig, Path]]:
    """The config and folder of the new or resumed run; the folder is locked within the block.

    Raises ConfigError if the name is taken, if another process has the run, or if there is no such run to resume;
    RecordError if the run's config.yaml is damaged.
    """
    storage, local = places(given)
    with contextlib.ExitStack() as stack:
        if given.get("resume"):
            yield _resumed(given, storage, local, stack)
            return
        config = build_config(given)
        run_dir = new_folder(config.name, config.preset, local, storage, begun, stack)
        yield absolute(replace(config, name=run_dir.name), storage, local), run_dir


def _resumed(given: dict[str, Any], storage: str, local: Path, stack: contextlib.ExitStack) -> tuple[TrainConfig, Path]:
    name = checked_name(str(given["resume"]), "resume")
    if given.get("name") not in (None, name):
        raise ConfigError(f"name is {given['name']!r}, and the run that goes on is {name!r}; it keeps its name")
    run_dir, us = local / name, None
    if run_dir.is_dir() or "://" in storage:
        us, before = stack.enter_context(locked(run_dir))
    if "://" in storage:
        fetch_record(storage, run_dir)
    if not us or not begun(run_dir):
        known = sorted(path.parent.name for path in local.glob(f"*/{CONFIG}"))
        raise ConfigError(f"no run {name!r} in {storage}.{did_you_mean(name, known)}")
    config = resume_config(saved_settings(run_dir / CONFIG), given)
    storage = storage if "storage_path" in given else config.storage_path or storage
    if "://" in storage:
        stack.enter_context(claimed(storage, str(config.name), us, before))
    return absolute(config, storage, local), run_dir


def new_folder(
    name: str | None,
    default: str,
    local: Path,
    storage: str,
    used: Callable[[Path], bool],
    stack: contextlib.ExitStack,
) -> Path:
    """Creates and locks a new run's folder, with this name or with the first default name that is free.

    Raises ConfigError if a run that is `used` or runs now has the name.
    """
    for candidate in [name] if name else default_names(default):
        run_dir = local / checked_name(candidate)
        try:
            with contextlib.ExitStack() as attempt:
                us, before = attempt.enter_context(locked(run_dir))
                if "://" in storage:
                    attempt.enter_context(claimed(storage, candidate, us, before))
                    fetch_record(storage, run_dir)
                if used(run_dir):
                    raise Taken(
                        f"there is a run {candidate!r} already; go on with --resume {candidate}, "
                        "or choose another --name"
                    )
                stack.push(attempt.pop_all())
                return run_dir
        except Taken:
            if name:
                raise
    raise AssertionError("default names do not end")


def default_names(beginning: str) -> Iterable[str]:
    """Names made of the time, then also of a number, for runs that start in the same second."""
    name = f"{beginning}-{datetime.now():%Y%m%d-%H%M%S}"
    return itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))


def begun(run_dir: Path) -> bool:
    """Whether a run has left files in the folder."""
    return any((run_dir / name).exists() for name in (CONFIG, RUN)) or any(run_dir.glob("checkpoint_*"))


def places(given: dict[str, Any]) -> tuple[str, Path]:
    """Where checkpoints are kept, a folder or a URL, and the local folder of runs."""
    storage = str(given.get("storage_path") or home() / "runs")
    if "://" in storage:
        check_storage(storage)
    return storage, home() / "runs" if "://" in storage else expanded(storage).absolute()


def checked_name(name: str, setting: str = "name") -> str:
    """Returns the name. Raises ConfigError if a folder cannot have it."""
    if "/" in name or name.startswith("."):
        raise ConfigError(f"{setting} is {name!r}; expected a name that a folder can have")
    if len(name.encode()) > LONGEST_NAME:
        raise ConfigError(
            f"{setting} has {len(name.encode())} bytes; expected at most {LONGEST_NAME}, as a folder's may have"
        )
    return name


def absolute(config: TrainConfig, storage: str, local: Path) -> TrainConfig:
    """Makes paths absolute, since workers have another working folder and environment than the driver."""
    cache = config.cache_dir or str(home() / ".cache")
    cache = cache if "://" in cache else str(expanded(cache).absolute())
    return replace(config, storage_path=storage if "://" in storage else str(local), cache_dir=cache)
