"""The loop inside a Ray Train worker: checkpoints through Ray, figures through the spool, news to the driver.

In: a `WorkerSpec` from the driver. Out: checkpoints in the run's storage, metrics in MLflow, events on the `Channel`.
Rank 0 speaks; the other ranks only train. Ray restarts this function after a failure, and it goes on from the last
checkpoint.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from gptcore import progress
from gptcore.config import ModelConfig
from gptcore.devices import pick_device
from gptcore.errors import FoundryError, RecordError, StorageFull, TrainingError
from gptcore.model import GPT
from gptcore.progress import doing
from gptcore.sampling import SamplingParams, generate_text
from gptcore.tokenizer import Tokenizer
from train_job.cluster.exporter import Exporter
from train_job.config import TrainConfig
from train_job.data.corpus import Corpus
from train_job.data.inputs import build_model, cache_dir, shard_store
from train_job.data.shards import prepare
from train_job.files import read_json, storage_problem, write_json
from train_job.tracking.runs import PEAK, SystemMetrics
from train_job.tracking.spool import Spool
from train_job.training.checkpoint import Identity, load_checkpoint, save_checkpoint, save_problem
from train_job.training.events import CheckpointDue, Evaluation, Event, Progress
from train_job.training.hardware import peak_memory_mb
from train_job.training.loop import Trainer
from train_job.training.storage import StoredCheckpoint, checkpoints, first_whole, superseded

STOP_LOOK_SECONDS = 0.1
UNJUDGED = 1e30
"""The validation loss under which Ray ranks a checkpoint that was not evaluated."""
SPOOL_PATIENCE_SECONDS = 30.0


@dataclass(frozen=True)
class WorkerSpec:
    """What the driver hands to every worker; all paths absolute, since workers change folder."""

    config: TrainConfig
    model: ModelConfig
    tokenizer: Tokenizer
    train: Corpus
    validation: Corpus
    initial: Any
    """ObjectRef of the parent's state dict, or None."""
    run_id: str
    tracking_uri: str = field(repr=False)  # it may have a password, and Ray's dashboard shows a run's config
    run_dir: Path
    channel: Any


class StopFlag:
    """Non-blocking check of the channel's stop flag."""

    def __init__(self, channel: Any) -> None:
        self.answer, self.next_look, self.asked = channel.wait_for_stop.remote(), 0.0, False

    def __call__(self) -> bool:
        if not self.asked and time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + STOP_LOOK_SECONDS
            self.asked = bool(ray.wait([self.answer], timeout=0)[0])
        return self.asked


def train_worker(settings: dict[str, WorkerSpec]) -> dict[str, float]:
    """Trains one rank; returns every rank's peak memory in MiB. A FoundryError ends the run without restarts."""
    spec = settings["spec"]
    # Rank 0 reports progress, through the driver.
    say: Any = spec.channel.post.remote if ray.train.get_context().get_world_rank() == 0 else len
    progress.set_output(say)
    if ray.get(spec.channel.failed.remote()):
        return {}
    try:
        return _train(spec)
    except (FoundryError, OSError) as error:
        problem = error if isinstance(error, FoundryError) else storage_problem(error, spec.run_dir)
        if not isinstance(error, FoundryError) and not isinstance(problem, StorageFull):
            raise  # a restart may help
        ray.get(spec.channel.fail.remote(problem))
        if ray.train.get_context().get_world_size() > 1:
            raise  # the other ranks may be waiting: Ray ends them, and a restart finds the problem in the channel
        return {}


def _train(spec: WorkerSpec) -> dict[str, float]:
    config, rank = spec.config, ray.train.get_context().get_world_rank()
    device = ray.train.torch.get_device() if config.use_gpu else pick_device(config.device)
    initial = ray.get(spec.initial) if spec.initial is not None else None
    with doing("preparing the worker: model and text"):
        model = build_model(config, spec.model, initial)
        train = prepare(spec.train, spec.tokenizer, cache_dir(config), store=shard_store(config))
        validation = prepare(spec.validation, spec.tokenizer, cache_dir(config), store=shard_store(config))
    trainer = Trainer(
        config,
        model,
        train,
        validation,
        device,
        wrap=lambda model: ray.train.torch.prepare_model(
            model, move_to_device=False, parallel_strategy_kwargs={"broadcast_buffers": False}
        ),
        stop_asked=StopFlag(spec.channel) if rank == 0 else lambda: False,
    )
    identity = trainer.identity(spec.tokenizer.fingerprint)
    _restore(spec, trainer, identity)
    reporter = Reporter(spec, trainer) if rank == 0 else None
    with doing(lambda: f"training: {trainer.state.step} steps are done"):
        for event in trainer.run():
            progress.reset_silence()
            if reporter:
                reporter.report(event)
            if isinstance(event, CheckpointDue):
                with doing(f"saving a checkpoint of step {event.step}"):
                    _save(trainer, identity, event, config)
    memory = _gather(peak_memory_mb(device))
    if reporter:
        reporter.close(memory)
    return memory


def _save(trainer: Trainer, identity: Identity, event: CheckpointDue, config: TrainConfig) -> None:
    """Writes a checkpoint on rank 0 and reports it to Ray; raises rank 0's problem on every rank."""
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
        folder = Path(scratch) / "checkpoint"
        problem = None
        if trainer.rank == 0:
            try:
                save_checkpoint(folder, trainer.state, identity, trainer.tensors(), trainer.optimizers.tensors())
            except TrainingError as error:
                problem = error
        _raise_together(problem)
        _report(event, folder if trainer.rank == 0 else None, config)


def _gather(figures: dict[str, float]) -> dict[str, float]:
    """Every rank's figures under its number, such as "worker 0 memory"."""
    everyone: list[Any] = [figures]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, figures)
    return {f"worker {n} {name}": value for n, theirs in enumerate(everyone) for name, value in theirs.items()}


def _restore(spec: WorkerSpec, trainer: Trainer, identity: Identity) -> None:
    """Restores every rank from the newest checkpoint that is whole, if there is one; rank 0 chooses it."""
    used, problem = None, None
    if trainer.rank == 0:

        def say(text: str) -> None:
            ray.get(spec.channel.post.remote(text))

        try:
            found = checkpoints(spec.config)
            if choice := first_whole(found, lambda folder: load_checkpoint(folder, identity), say):
                used, checkpoint = choice
                trainer.restore(checkpoint)
                if not ray.train.get_checkpoint():  # Ray removes those that it knows itself
                    _remove(superseded(found, used), say)
        except FoundryError as error:
            problem = error
    _raise_together(problem)
    used = _from_rank_0(used)
    if used and trainer.rank > 0:
        with used.files() as folder:
            trainer.restore(load_checkpoint(folder, identity))


def _remove(checkpoints: list[StoredCheckpoint], say: Callable[[str], None]) -> None:
    """Removes checkpoints of an earlier worker, which this Ray Train does not know."""
    for kept in checkpoints:
        try:
            kept.fs.delete_dir(kept.path)
        except OSError as error:
            say(f"warning: {kept.path} is not needed, and cannot be removed: {error}")


def _report(event: CheckpointDue, folder: Path | None, config: TrainConfig) -> None:
    """Reports the checkpoint to Ray, which uploads it; a barrier for all ranks."""
    checkpoint = ray.train.Checkpoint.from_directory(folder) if folder else None
    try:
        # Ray stores metrics as JSON, which has no infinity.
        ray.train.report({"val_loss": min(event.loss, UNJUDGED), "step": event.step}, checkpoint=checkpoint)
    except OSError as error:
        raise (save_problem(error, config.storage_path) or error) from None


def _from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        shared = [value]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]
    return value


def _raise_together(problem: Exception | None) -> None:
    """Raises rank 0's problem on every rank, so that none waits for rank 0 in vain."""
    if problem := _from_rank_0(problem):
        raise problem


class Reporter:
    """Sends rank 0's events to the driver, and their figures to MLflow's spool and Ray's exporter."""

    def __init__(self, spec: WorkerSpec, trainer: Trainer) -> None:
        self.spec, self.trainer = spec, trainer
        spec.run_dir.mkdir(parents=True, exist_ok=True)
        self.spool = Spool(spec.run_dir / "spool", spec.run_id, spec.tracking_uri)
        self.system = SystemMetrics(self.spool)
        self.exporter = Exporter(str(spec.config.name))
        self.samples = spec.run_dir / "samples.json"

    def report(self, event: Event) -> None:
        """Posts the event; metrics of steps that were logged before a restart are not logged again."""
        self.spec.channel.post.remote(event)
        self.exporter.report(event)
        if isinstance(event, Progress):
            figures = {
                "train/loss": event.loss,
                "train/bits_per_byte": event.bits_per_byte,
                "learning_rate": event.learning_rate,
                "grad_norm": event.grad_norm,
                "tokens_per_second": event.tokens_per_second,
                "tokens_seen": event.tokens,
                "epoch": event.epoch,
            }
            self.spool.metrics(event.step, figures | ({"mfu": event.mfu} if event.mfu is not None else {}))
        elif isinstance(event, Evaluation):
            self.spool.metrics(event.step, {"val/loss": event.loss, "val/bits_per_byte": event.bits_per_byte})
            self._sample(event.step)

    def _sample(self, step: int) -> None:
        """Adds the model's continuation of every prompt to a table that MLflow's UI shows."""
        config, model = self.spec.config, self.trainer.model
        if not config.sample_tokens:
            return
        rows = [row for row in self._samples() if row[0] < step]
        params = SamplingParams(max_new_tokens=config.sample_tokens, temperature=0.8, top_k=50, seed=config.seed)
        rows += [
            [step, prompt, continue_text(model, self.spec.tokenizer, prompt, params)]
            for prompt in config.sample_prompts
        ]
        write_json(self.samples, {"columns": ["step", "prompt", "continuation"], "data": rows})
        self.spool.artifact(self.samples, table=True)

    def _samples(self) -> list[Any]:
        """The rows of the table; if the file is damaged, none, and a line says so."""
        if not self.samples.exists():
            return []
        with suppress(RecordError, KeyError, TypeError, ValueError):
            rows = read_json(self.samples, "")["data"]
            if all(isinstance(step, int) for step, _, _ in rows):
                return list(rows)
        self.spec.channel.post.remote(f"{self.samples} was damaged; its table begins anew")
        return []

    def close(self, memory: dict[str, float]) -> None:
        """Logs the workers' peak memory and waits up to SPOOL_PATIENCE_SECONDS until the server has everything."""
        self.spool.metrics(self.trainer.state.step, {f"{PEAK} {name}": value for name, value in memory.items()})
        self.system.stop()
        if left := self.spool.close(SPOOL_PATIENCE_SECONDS):
            ray.get(
                self.spec.channel.post.remote(
                    f"{left} metric lines wait for the tracking server in {self.spool.folder}"
                )
            )


def continue_text(model: GPT, tokenizer: Tokenizer, prompt: str, params: SamplingParams) -> str:
    """The model's continuation of a prompt, in evaluation mode."""
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # its many lengths would be compiled, and training again
            return generate_text(model, tokenizer, prompt, params)
    finally:
        model.train()
