"""From a command line to a sweep's config and its locked folder.

In: flags and a YAML file. Out: a new sweep under a free name, or an earlier one that is resumed.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptcore.errors import ConfigError, RecordError, did_you_mean
from train_job.cli import add_flag, given_settings, settings_parser
from train_job.session.begin import begun, new_folder, places
from train_job.session.lock import claimed, locked
from train_job.sweeps.space import FIELDS, FLAGS, HINTS, SweepConfig, build_sweep
from train_job.yaml_files import read_yaml

EXAMPLES = {
    "train_job/sweeps/quick.yaml": "the sweep that comes along, on text that Python brings along",
    "train_job/sweeps/quick.yaml --data notes.txt --trials 16": "more of it, on your own text",
    "--resume NAME": "go on with a sweep that was stopped",
}
PLAN = "sweep.yaml"
"""The file in a sweep's folder with its config."""
EXTENSIBLE = {"trials", "concurrency", "keep"}
"""A sweep's own settings that a resume may change; of its trials' settings it may change MACHINE."""
MACHINE = frozenset(
    {"num_workers", "use_gpu", "cpus_per_worker", "micro_batch_size", "max_failures", "device"}
    | {"register_as", "promote"}
)


@contextlib.contextmanager
def begin_sweep(argv: list[str]) -> Iterator[tuple[SweepConfig, Path]]:
    """The config and folder of the new or resumed sweep; the folder is locked within the block.

    Raises ConfigError or RecordError.
    """
    parser = settings_parser(
        "python train_job/sweep.py",
        "Train many times with settings from ranges, stop the hopeless early, register the best. Settings of run.py "
        "are every trial's; flags win over the file.",
        EXAMPLES,
    )
    texts = (f"{name}: {FIELDS[name].metadata['help']}" for name in FIELDS if name not in FLAGS)
    group = parser.add_argument_group("the sweep's own", f"In the file alone: {' '.join(texts)}")
    group.add_argument("file", nargs="?", metavar="SWEEP.yaml", help="the settings below, with _ for -")
    for name in FLAGS:
        add_flag(group, FIELDS[name], HINTS[name])
    given = given_settings(parser, argv)
    file, own = given.pop("file", None), {name: given.pop(name) for name in FLAGS if name in given}
    with contextlib.ExitStack() as stack:
        if given.get("resume"):
            yield _resumed(given, own, file, stack)
            return
        if not file:
            raise ConfigError(
                "no sweep is named; expected a file such as train_job/sweeps/quick.yaml, or --resume NAME"
            )
        said = read_yaml(file)
        if isinstance(said.get("base", {}), dict):
            said["base"] = said.get("base", {}) | given
        sweep = build_sweep(said | own)
        storage, local = places(dict(sweep.base))
        wanted = str(sweep.base["name"]) if sweep.base.get("name") else None
        run_dir = new_folder(wanted, Path(file).stem, local, storage, used, stack)
        yield replace(sweep, base=sweep.base | {"name": run_dir.name, "storage_path": storage}), run_dir


def used(run_dir: Path) -> bool:
    """Whether a sweep or a run has left files in the folder."""
    return (run_dir / PLAN).exists() or begun(run_dir)


def _resumed(
    given: dict[str, Any], own: dict[str, Any], file: str | None, stack: contextlib.ExitStack
) -> tuple[SweepConfig, Path]:
    name = str(given.pop("resume"))
    _, local = places(given)
    given.pop("storage_path", None)
    run_dir = local / name
    if not (run_dir / PLAN).exists():
        known = sorted(path.parent.name for path in local.glob(f"*/{PLAN}"))
        raise ConfigError(f"no sweep {name!r} in {local}.{did_you_mean(name, known)}")
    us, before = stack.enter_context(locked(run_dir))
    if changed := sorted((own.keys() - EXTENSIBLE) | (given.keys() - MACHINE)) or file:
        what = changed[0] if isinstance(changed, list) else changed
        raise ConfigError(f"{what} cannot be given to a sweep that goes on; leave it out, or begin a new sweep")
    saved = read_yaml(str(run_dir / PLAN))
    lacking = [key for key in ("search", "base") if not isinstance(saved.get(key), dict)]
    lacking += [f"base.{key}" for key in ("name", "storage_path") if not lacking and not saved["base"].get(key)]
    if lacking:
        raise RecordError(f"{run_dir / PLAN} lacks {lacking[0]!r}; put a copy back, or begin a new sweep")
    if "://" in (storage := str(saved["base"]["storage_path"])):
        stack.enter_context(claimed(storage, name, us, before))
    return build_sweep(saved | own | {"base": saved["base"] | given}), run_dir
