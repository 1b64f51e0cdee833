"""Writes a run's checkpoints while it trains on.

In: a Trainer that stands still. Out: a checkpoint in the run's storage, and no more checkpoints than are needed.
"""

import tempfile
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from gptcore.devices import pick_device
from gptcore.progress import doing
from train_job.config import TrainConfig
from train_job.files import one_line
from train_job.training.checkpoint import Identity, TrainState, save_checkpoint
from train_job.training.loop import Trainer
from train_job.training.parallel import world_size
from train_job.training.storage import checkpoints, copy_file, local_folder, run_storage, superseded

Say = Callable[[str], None]


class CheckpointWriter:
    """Copies the state to other memory, and writes the copy in a thread: one checkpoint at a time.

    Every worker has one and saves at the same steps. `session` is the same on all workers and unlike that of any
    earlier one: it tells apart the checkpoints of a step that was repeated. `damaged` are names of checkpoints that are
    no substitute for others; they stay, so that they can be examined. `sync` puts what must be on the disk before a
    checkpoint there; it is called in the thread.
    """

    def __init__(
        self,
        config: TrainConfig,
        identity: Identity,
        session: str,
        say: Say,
        damaged: Collection[str] = (),
        sync: Callable[[], None] | None = None,
    ) -> None:
        self._config, self._identity, self._session, self._say = config, identity, session, say
        self._damaged, self._sync = damaged, sync
        # A group of its own, since the thread's messages come between those of the steps.
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        cuda = config.use_gpu or pick_device(config.device).type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )
        self._writing: Future[None] | None = None

    def save(self, trainer: Trainer) -> None:
        """Starts to write a checkpoint of this step, once the last one is written. Raises what `wait` raises."""
        self.wait()
        self._writing = written = Future[None]()
        tensors: Any = self._stager.stage(trainer.tensors() if trainer.sharded else dealt(trainer.tensors()))
        work = (written, replace(trainer.state), tensors, trainer.device)
        Thread(target=self._run, args=work, name="checkpoint", daemon=True).start()

    def wait(self) -> None:
        """Waits until the last checkpoint is written. Raises TrainingError, on all workers, if it could not be."""
        if self._writing:
            written, self._writing = self._writing, None
            with doing("writing a checkpoint"):
                written.result()

    def check(self) -> None:
        """Raises what `wait` raises, if that is known by now."""
        if self._writing and self._writing.done():
            self.wait()

    def _run(
        self, written: "Future[None]", state: TrainState, tensors: Mapping[str, Tensor], device: torch.device
    ) -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread begins with the first
            self._write(state, tensors)
        except BaseException as error:
            written.set_exception(error)
        else:
            written.set_result(None)

    def _write(self, state: TrainState, tensors: Mapping[str, Tensor]) -> None:
        fs, run = run_storage(self._config)
        path = f"{run}/checkpoint_{self._session}_{state.step:08}"
        here = local_folder(fs, path)
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
            folder = here or Path(scratch) / "checkpoint"
            upload = partial(copy_file, fs=fs, folder=path)
            first = not self._group or dist.get_rank() == 0
            try:
                save_checkpoint(
                    folder, state, self._identity, tensors, self._group, None if here else upload, self._sync
                )
            except BaseException:
                if first and not here:
                    with suppress(OSError):
                        fs.delete_dir(path)
                raise
        if first:
            self._remove_superseded(path)

    def _remove_superseded(self, path: str) -> None:
        try:
            found = [kept for kept in checkpoints(self._config) if kept.name not in self._damaged]
            unneeded = [kept for kept in found if kept.unfinished and self._session not in kept.name]
            for written in (kept for kept in found if kept.name == path.rpartition("/")[2]):
                unneeded += superseded(found, written)
            for kept in unneeded:
                kept.fs.delete_dir(kept.path)
        except OSError as error:
            self._say(f"warning: unneeded checkpoints of {self._config.name} could not be removed: {one_line(error)}")


def dealt(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This worker's share of tensors that all workers have, about as many bytes for each."""
    workers, rank = world_size(), dist.get_rank() if dist.is_initialized() else 0
    loads = [0] * workers
    share = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        owner = loads.index(min(loads))
        loads[owner] += tensor.nbytes
        if owner == rank:
            share[name] = tensor
    return share
