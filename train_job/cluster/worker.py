"""The loop inside a Ray Train worker: checkpoints to the storage, figures through the spool, news to the driver.

In: a `WorkerSpec` from the driver. Out: checkpoints in the run's storage, metrics in MLflow, events on the `Channel`.
Rank 0 speaks; the other ranks only train. Ray restarts this function after a failure, and it goes on from the last
checkpoint.
"""

import itertools
import os
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from gptcore import progress
from gptcore.config import ModelConfig
from gptcore.devices import pick_device, pick_dtype
from gptcore.errors import FoundryError, RecordError, StorageFull
from gptcore.hf_format import empty_model
from gptcore.lora import add_adapters, initial_adapters
from gptcore.model import GPT
from gptcore.progress import doing
from gptcore.sampling import SamplingParams, generate
from gptcore.text import TextStream
from gptcore.tokenizer import Tokenizer
from train_job.cluster.exporter import Exporter
from train_job.config import TrainConfig
from train_job.data.corpus import Corpus
from train_job.data.inputs import build_model, cache_dir, sample_prompt, seeded_weights, shard_store
from train_job.data.shards import prepare
from train_job.files import read_json, storage_problem, write_json
from train_job.tracking.runs import PEAK, SystemMetrics
from train_job.tracking.spool import Spool
from train_job.training.checkpoint import Identity, check_checkpoint
from train_job.training.events import CheckpointDue, Evaluation, Event, Progress
from train_job.training.hardware import peak_memory_mb
from train_job.training.loop import Trainer
from train_job.training.parallel import is_sharded, unused_after
from train_job.training.storage import checkpoints, first_whole
from train_job.training.writer import CheckpointWriter

STOP_LOOK_SECONDS = 0.1
SPOOL_PATIENCE_SECONDS = 30.0


@dataclass(frozen=True)
class WorkerSpec:
    """What the driver hands to every worker; all paths absolute, since workers change folder."""

    config: TrainConfig
    model: ModelConfig
    tokenizer: Tokenizer
    train: Corpus
    validation: Corpus
    initial: dict[str, Any]
    """ObjectRefs of the parent's parameters; none for a model from scratch."""
    base: str
    """A hash of them if they are frozen, or empty."""
    run_id: str
    tracking_uri: str = field(repr=False)  # it may have a password, and Ray's dashboard shows a run's config
    run_dir: Path
    channel: Any


class Sample(NamedTuple):
    """A continuation, and whether the model ended it."""

    text: str
    ended: bool


class StopFlag:
    """Non-blocking check of the channel's stop flag."""

    def __init__(self, channel: Any) -> None:
        self.answer, self.next_look, self.asked = channel.wait_for_stop.remote(), 0.0, False

    def __call__(self) -> bool:
        if not self.asked and time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + STOP_LOOK_SECONDS
            self.asked = bool(ray.wait([self.answer], timeout=0)[0])
        return self.asked


def train_worker(spec: WorkerSpec) -> dict[str, float]:
    """Trains one rank; returns every rank's peak memory in MiB. A FoundryError ends the run without restarts."""
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
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if threads.isdecimal() and int(threads):  # Ray sets it after the preload, and torch has not read it
        torch.set_num_threads(int(threads))
    with doing("preparing the worker: model and text"):
        model, weights = _model(spec, device)
        train = prepare(spec.train, spec.tokenizer, cache_dir(config), store=shard_store(config))
        validation = prepare(spec.validation, spec.tokenizer, cache_dir(config), store=shard_store(config))
        stop_asked = StopFlag(spec.channel) if rank == 0 else lambda: False
        trainer = Trainer(config, model, train, validation, device, stop_asked, weights, spec.base)
    identity = trainer.identity(spec.tokenizer.fingerprint)
    session = _from_rank_0(f"{datetime.now():%Y-%m-%d_%H-%M-%S.%f}")
    damaged = _restore(spec, trainer, identity)
    reporter = Reporter(spec, trainer) if rank == 0 else None
    sync = reporter.spool.sync if reporter else None  # a resume does not log the steps before its checkpoint again
    writer = CheckpointWriter(config, identity, session, lambda text: spec.channel.post.remote(text), damaged, sync)
    try:
        with doing(lambda: f"training: {trainer.state.step} steps are done"):
            for event in trainer.run():
                progress.reset_silence()
                if reporter:
                    reporter.report(event)
                if isinstance(event, Evaluation) and (reporter or trainer.sharded):  # sharded, it takes all of them
                    samples = _samples(trainer, spec.tokenizer)
                    if reporter:
                        reporter.keep_samples(event.step, samples)
                writer.check()
                if isinstance(event, CheckpointDue):
                    train.check_unchanged()  # no checkpoint has learned from tokens that were changed
                    writer.save(trainer)
        writer.wait()
    except Exception:
        with suppress(Exception):
            writer.wait()  # the last checkpoint is good, whatever came after it
        raise
    memory = _gather(peak_memory_mb(device))
    if reporter:
        reporter.close(memory)
    return memory


def _model(spec: WorkerSpec, device: torch.device) -> tuple[GPT, Iterable[tuple[str, torch.Tensor]]]:
    """The model and, if it is without memory, as a sharded or adapted one, its weights: the seed's or the parent's."""
    config, shape, lora = spec.config, spec.model, spec.config.lora
    parent = ((name, ray.get(ref)) for name, ref in spec.initial.items())
    if lora:
        model = empty_model(shape)
        add_adapters(model, lora, pick_dtype(config.precision, device))
        return model, itertools.chain(parent, initial_adapters(shape, lora, config.seed))
    if is_sharded(config):
        return empty_model(shape), parent if spec.initial else seeded_weights(config, shape)
    return build_model(config, shape, dict(parent)), ()


def _gather(figures: dict[str, float]) -> dict[str, float]:
    """Every rank's figures under its number, such as "worker 0 memory"."""
    everyone: list[Any] = [figures]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, figures)
    return {f"worker {n} {name}": value for n, theirs in enumerate(everyone) for name, value in theirs.items()}


def _restore(spec: WorkerSpec, trainer: Trainer, identity: Identity) -> list[str]:
    """Restores every rank from the newest checkpoint that is whole, if there is one; rank 0 chooses it.

    Returns the names of newer ones that are damaged, on rank 0.
    """
    used, problem, damaged = None, None, []
    if trainer.rank == 0:

        def say(text: str) -> None:
            ray.get(spec.channel.post.remote(text))

        try:
            found = checkpoints(spec.config)
            if choice := first_whole(found, lambda folder: check_checkpoint(folder, identity), say):
                used, _ = choice
                damaged = [kept.name for kept in found[: found.index(used)] if not kept.unfinished]
        except FoundryError as error:
            problem = error
    _raise_together(problem)
    if used := _from_rank_0(used):
        with used.files() as folder:
            trainer.restore(folder)
    return damaged


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
            some = {"mfu": event.mfu, "train/answered": event.answered}
            self.spool.metrics(event.step, figures | {name: value for name, value in some.items() if value is not None})
        elif isinstance(event, Evaluation):
            self.spool.metrics(event.step, {"val/loss": event.loss, "val/bits_per_byte": event.bits_per_byte})

    def keep_samples(self, step: int, samples: dict[str, Sample]) -> None:
        """Adds the model's continuation of every prompt to a table that MLflow's UI shows.

        In a chat, the share of answers that end by themselves is a metric.
        """
        if not samples:
            return
        if self.spec.config.objective == "chat":
            ended = sum(sample.ended for sample in samples.values()) / len(samples)
            self.spool.metrics(step, {"val/answers_ended": ended})
        rows = [row for row in self._samples() if row[0] < step]
        rows += [[step, prompt, sample.text] for prompt, sample in samples.items()]
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


def _samples(trainer: Trainer, tokenizer: Tokenizer) -> dict[str, Sample]:
    """The model's continuation of every prompt, in evaluation mode."""
    config, model = trainer.config, trainer.model
    if not config.sample_tokens:
        return {}
    params = SamplingParams(max_new_tokens=config.sample_tokens, temperature=0.8, top_k=50, seed=config.seed)
    model.eval()
    try:
        with (
            # A compiled model would be compiled for many lengths, and for training again.
            torch.compiler.set_stance("force_eager") if config.compile else nullcontext(),
            # Sharded weights are fetched in autocast's dtype, and frozen ones are kept in it.
            trainer.autocast() if trainer.sharded or config.lora else nullcontext(),
        ):
            prompts = {prompt: sample_prompt(config, tokenizer, prompt) for prompt in config.sample_prompts}
            made = {prompt: [*generate(model, tokenizer, ids, params)] for prompt, ids in prompts.items()}
    finally:
        unused_after(model)
        model.train()
    room = {prompt: model.config.context_length - len(ids) for prompt, ids in prompts.items()}
    return {
        prompt: Sample(_text(tokenizer, ids), len(ids) < min(config.sample_tokens, room[prompt]))
        for prompt, ids in made.items()
    }


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = TextStream(tokenizer, begins=False)
    return "".join([*map(stream.push, ids), stream.flush()])
